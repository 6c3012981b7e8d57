"""Loading models as users have them, the mistakes they make with them, and saving."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GptOssConfig, PreTrainedConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from tests.model.padded import PaddedAttention
from tests.small_models import CHATML, FAMILIES, VOCABULARY, bpe_tokenizer, own_model, random_model, write_model
from thinktwice_fast.config import ModelOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model import loading
from thinktwice_fast.model import weights as weights_module
from thinktwice_fast.model.loading import load_model, model_folder, pick_device, pick_dtype, save_model
from thinktwice_fast.model.policy import Policy, linear_head
from thinktwice_fast.model.sharding import cast_parameters, full_state, pair_models
from thinktwice_fast.model.transformer import Transformer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A model folder to spoil."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def load(path: Path | str, **options: Any) -> Any:
    return load_model(ModelOptions(path=str(path), **options), 0, CPU)


def refuse(path: Path | str, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load(path, **options)
    assert len(str(caught.value).splitlines()) == 1


def without(folder: Path, *patterns: str) -> Path:
    for pattern in patterns:
        found = list(folder.glob(pattern))
        assert found, pattern
        for path in found:
            path.unlink()
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_what_transformers_saved(family: str, tmp_path: Path) -> None:
    loaded = load(write_model(tmp_path, family))
    ids = torch.arange(9)
    attention = PaddedAttention.from_lengths([9], CPU)
    logits = Policy(loaded.model)(ids, ids, attention, ids, linear_head)
    expected = random_model(family)(input_ids=ids[None], use_cache=False).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert loaded.stop_ids == {loaded.tokenizer.eos_token_id}
    assert not loaded.model.training


def test_end_tokens_of_model_and_tokenizer_both_stop(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    loaded = load(folder)
    assert loaded.stop_ids == {0, 5, loaded.tokenizer.eos_token_id}


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuse(tmp_path / "nowhere", "nowhere: no such folder: check the path, or give a hub name")
    refuse(Path("no/where"), "no/where: neither a model folder here nor a model the hub gives .*: check the name")


def test_folder_without_config(folder: Path) -> None:
    refuse(without(folder, "config.json"), "no config.json in it")


def test_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refuse(folder, "--model.path")


def test_config_of_an_unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "mystery"}))
    refuse(folder, "--model.path .*mystery")


def test_architecture_that_is_no_language_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refuse(folder, "can't load it as a causal language model")
    refuse(folder, "can't load it as a causal language model", random_init=True)


def test_folder_without_weights(folder: Path) -> None:
    without(folder, "*.safetensors")
    refuse(folder, r"no weights \(\*\.safetensors\) in it: .* --model.random_init true")
    assert len(load(folder, random_init=True).tokenizer) <= VOCABULARY


def test_broken_weights(folder: Path) -> None:
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    refuse(folder, r"can't load it as a causal language model \(.*header.*check its config.json and weights")


def test_weights_that_are_not_all_there(folder: Path) -> None:
    weights = next(folder.glob("*.safetensors"))
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    refuse(folder, r"1 tensors are missing, among them model\.layers\.1\.mlp\.up_proj\.weight")


def test_an_index_that_places_nothing(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")
    refuse(folder, r"can't load it as a causal language model \(model.safetensors.index.json has no weight_map\)")


def test_a_model_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nMore words.")

    monkeypatch.setattr(loading, "read_transformer", full)
    refuse(folder, r"does not fit cpu \(CUDA out of memory\. .*\): take a smaller model .* --dry-run")


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    refuse(folder, "can't load it as a causal language model")


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_without_tokenizer(family: str, tmp_path: Path) -> None:
    folder = without(write_model(tmp_path, family), "tokenizer*")
    refuse(folder, "no tokenizer that loads is in it .*: put tokenizer.json and")


def test_folder_without_chat_template(folder: Path, tmp_path: Path) -> None:
    refuse(without(folder, "chat_template.jinja"), "has no chat template: give a Jinja file with --model.chat_template")
    refuse(folder, "--model.chat_template .*missing: can't read it", chat_template=str(tmp_path / "missing"))
    (tmp_path / "own.jinja").write_text(CHATML)
    assert load(folder, chat_template=str(tmp_path / "own.jinja")).tokenizer.chat_template == CHATML


def test_tokenizer_larger_than_the_vocabulary(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(VOCABULARY)])
    tokenizer.save_pretrained(folder)
    refuse(folder, rf"its tokenizer has \d+ tokens but the model only {VOCABULARY}")


def write_config(config: PreTrainedConfig, folder: Path) -> Path:
    config.save_pretrained(folder)
    bpe_tokenizer().save_pretrained(folder)
    return folder


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def test_capped_attention_scores_are_refused(tmp_path: Path) -> None:
    folder = write_config(Gemma2Config(**SMALL), tmp_path)
    refuse(folder, "Gemma2Attention asks its attention for softcap", random_init=True)


def test_capped_logits_are_refused(tmp_path: Path) -> None:
    config = Gemma2Config(**SMALL, attn_logit_softcapping=None, final_logit_softcapping=0.05)
    refuse(write_config(config, tmp_path), "transforms its logits after the output layer", random_init=True)


def test_attention_sinks_are_refused(tmp_path: Path) -> None:
    config = GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)
    refuse(write_config(config, tmp_path), "GptOssAttention asks its attention for s_aux", random_init=True)


def test_sharded_weights_are_read_as_they_are(tmp_path: Path) -> None:
    """Also without the head of a decoder that was saved alone, and next to another copy."""
    model = random_model("llama")
    write_model(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    model.base_model.save_pretrained(tmp_path / "alone", max_shard_size="100KB")
    for path in (tmp_path / "alone").glob("model*"):
        path.rename(tmp_path / path.name)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    save_file({"other": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    found = load(tmp_path).model
    assert isinstance(found, Transformer)
    for name, value in found.split(found.state_dict().items()):
        assert torch.equal(value, model.state_dict()[name])


def test_large_weights_are_written_in_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "SHARD", "100KB")
    loaded = load(folder)
    state = dict(loaded.model.split(loaded.model.state_dict().items()))
    for _ in range(2):  # the second time over the first's files
        save_model(loaded.model, state, loaded.tokenizer, tmp_path / "out", torch.float32)
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert all(torch.equal(value, state[name]) for name, value in back.named_parameters())


@pytest.mark.parametrize("kind", ["transformers disagrees", "unknown", "pytorch files"])
def test_transformers_modules_run_where_the_own_decoder_can_not(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "transformers disagrees":
        own = Qwen3MLP.forward
        monkeypatch.setattr(Qwen3MLP, "forward", lambda self, x: 1.1 * own(self, x))
    elif kind == "unknown":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    else:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    assert not isinstance(load(folder).model, Transformer)
    says = ["the trainer's own decoder does not reproduce qwen3: transformers' modules run instead"]
    assert [record.getMessage() for record in caplog.records] == (says if kind == "transformers disagrees" else [])


def test_random_weights_come_from_the_seed(folder: Path) -> None:
    def head(seed: int) -> Any:
        options = ModelOptions(path=str(folder), random_init=True)
        return load_model(options, seed, CPU).model.head

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_checkpointing_computes_each_layer_again(folder: Path, checkpointing: bool) -> None:
    model = load(folder, activation_checkpointing=checkpointing).model
    calls: list[nn.Module] = []
    for layer in model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, *_: calls.append(module))
    ids = torch.arange(9)
    logits = Policy(model)(ids, ids, PaddedAttention.from_lengths([9], CPU), ids, linear_head)
    logits.square().sum().backward()
    assert len(calls) == (2 if checkpointing else 1) * len(model.layers)
    plain = random_model("qwen3")
    plain(input_ids=ids[None], use_cache=False).logits.square().sum().backward()
    found = dict(model.split((name, parameter.grad) for name, parameter in model.named_parameters()))
    for name, parameter in plain.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5 * scale)


def test_a_copy_of_a_checkpointed_model_has_its_own_layers(folder: Path) -> None:
    """Rollouts may decode with a copy, made before the original is sharded."""
    model = load(folder, activation_checkpointing=True).model
    copied = copy.deepcopy(model)
    ids = torch.arange(9)

    def logits(of: Any) -> torch.Tensor:
        with torch.no_grad():
            return Policy(of)(ids, ids, PaddedAttention.from_lengths([9], CPU), ids, linear_head)

    before = logits(model)
    for layer in copied.layers:
        layer.mlp.down_proj.weight.data.zero_()
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(copied), before)


def test_activation_checkpointing_wakes_no_dropout(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    model = load(folder, activation_checkpointing=True).model
    ids = torch.arange(9)
    logits = Policy(model)(ids, ids, PaddedAttention.from_lengths([9], CPU), ids, linear_head)
    assert logits.isfinite().all()


def test_the_shipped_model() -> None:
    if not Path(model_folder("tiny")).is_dir():
        pytest.skip("the shipped model is not made yet")
    loaded = load("tiny")
    assert Path(model_folder("tiny")).parent.name == "assets"
    assert model_folder("elsewhere/tiny") == "elsewhere/tiny"
    assert len(loaded.tokenizer) <= loaded.model.config.vocab_size


def test_device_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device(ModelOptions(), 0) == CPU
    with pytest.raises(UserError, match=r"--model\.device cuda: there is no GPU here: use --model\.device cpu"):
        pick_device(ModelOptions(device="cuda"), 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(ModelOptions(), 1) == torch.device("cuda", 1)
    assert pick_device(ModelOptions(device="cpu"), 5) == CPU
    with pytest.raises(UserError, match=r"process 2 has no GPU of its own .*: start fewer processes"):
        pick_device(ModelOptions(), 2)
    assert pick_dtype(ModelOptions(), CPU) == torch.float32
    assert pick_dtype(ModelOptions(), torch.device("cuda", 0)) == torch.bfloat16
    assert pick_dtype(ModelOptions(compute_dtype="bfloat16"), CPU) == torch.bfloat16


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("one_process")
def test_saved_models_load_in_transformers(family: str, compute: torch.dtype, tmp_path: Path) -> None:
    loaded = load(write_model(tmp_path / "in", family))
    models = pair_models(loaded.model, compute)
    with torch.no_grad():
        for parameter in models.masters.parameters():
            parameter.mul_(1.5)
    state = full_state(models.masters)
    save_model(models.masters.model, state, loaded.tokenizer, tmp_path / "out", torch.float32)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    original = random_model(family)
    assert back.config.tie_word_embeddings == original.config.tie_word_embeddings
    tied = back.get_input_embeddings().weight is back.get_output_embeddings().weight
    assert tied == original.config.tie_word_embeddings
    for (name, value), (other_name, other) in zip(back.named_parameters(), original.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(value, other * 1.5), name
    again = load(tmp_path / "out")
    assert again.stop_ids == loaded.stop_ids
    assert again.tokenizer.chat_template == loaded.tokenizer.chat_template


@pytest.mark.usefixtures("one_process")
def test_saving_in_bfloat16(tmp_path: Path) -> None:
    loaded = load(write_model(tmp_path / "in", "llama"))
    models = pair_models(loaded.model, torch.float32)
    save_model(models.masters.model, full_state(models.masters), loaded.tokenizer, tmp_path / "out", torch.bfloat16)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    trained = full_state(models.masters)
    for name, value in back.named_parameters():
        assert trained[name].dtype == torch.float32
        assert torch.equal(value, trained[name].to(torch.bfloat16))


def test_rotary_frequencies_stay_float32() -> None:
    for model in (cast_parameters(own_model("llama"), torch.bfloat16), own_model("llama").to(torch.bfloat16)):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        (frequencies,) = model.buffers()
        assert torch.equal(frequencies, own_model("llama").rotary["every"].inv_freq)
