"""A GPU's memory that changes hands, over ops that are made up; csrc/cuda/arena.h has a test of its own."""

import pytest
import torch

from thinktwice_fast.errors import UserError
from thinktwice_fast.model import arena
from thinktwice_fast.model.arena import Arena, peak_bytes, restart_peak, why_no_arena

GPU = torch.device("cuda", 0)
FREE = 64 << 20


class Gpu:
    """The ops of arenas and what of ``torch.cuda`` goes with them, in the order in which they are called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[str] = []
        self.sizes: dict[int, int] = {}
        self.free = FREE
        self.torch_peak = 0
        monkeypatch.setattr(arena, "ops", self)
        monkeypatch.setattr(arena, "_mapped", arena.defaultdict(int))
        monkeypatch.setattr(arena, "_peaks", arena.defaultdict(int))
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.calls.append("empty_cache"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.calls.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.torch_peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, device: torch.device) -> None:
        self.torch_peak = 0

    def arena_create(self, device: int, size: int) -> int:
        if size > 1 << 40:
            raise RuntimeError("arena on GPU 0: reserving addresses failed: invalid value\nand a trace")
        self.sizes[len(self.sizes)] = size
        return len(self.sizes) - 1

    def arena_map(self, number: int) -> None:
        self.calls.append("map")
        if self.sizes[number] > self.free:
            raise RuntimeError("arena on GPU 0: taking 9 bytes failed: out of memory")
        self.free -= self.sizes[number]

    def arena_unmap(self, number: int) -> None:
        self.calls.append("unmap")
        self.free += self.sizes[number]

    def arena_tensor(self, number: int) -> torch.Tensor:
        return torch.zeros(self.sizes[number] + 4096, dtype=torch.uint8)  # whole pages

    def arena_destroy(self, number: int) -> None:
        self.calls.append("destroy")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_memory_comes_and_goes_in_order(gpu: Gpu) -> None:
    lent = Arena(GPU, 1 << 20)
    lent.unmap()
    assert gpu.calls == [] and gpu.free == FREE
    for _ in range(2):
        lent.map()
        lent.map()
        assert lent.tensor().shape == (1 << 20,)
        lent.unmap()
        lent.unmap()
    assert gpu.calls == ["synchronize", "empty_cache", "map", "synchronize", "unmap"] * 2 and gpu.free == FREE
    lent.map()
    lent.close()
    assert gpu.calls[-4:] == ["synchronize", "unmap", "synchronize", "destroy"]


@pytest.mark.parametrize("broken", [False, True])
def test_one_that_is_let_go_waits_for_the_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    lent = Arena(GPU, 1 << 20)
    lent.map()

    def synchronize(device: torch.device) -> None:
        gpu.calls.append("waits")
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    del lent
    assert gpu.calls[-2:] == ["waits", "destroy"]


def test_one_that_could_not_be_unmapped_whole_is_mapped_again(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    lent = Arena(GPU, 1 << 20)
    lent.map()

    def fail(number: int) -> None:
        raise RuntimeError("arena on GPU 0: giving back 9 bytes failed: unknown error")

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "arena_unmap", fail)
        with pytest.raises(RuntimeError):
            lent.unmap()
    lent.map()
    assert gpu.calls.count("map") == 2 and peak_bytes(GPU) == 1 << 20


def test_too_little_memory_is_one_line_and_may_be_there_later(gpu: Gpu) -> None:
    lent, gpu.free = Arena(GPU, 1 << 25), 1 << 20
    with pytest.raises(
        UserError, match=r"^0\.03 GiB of GPU memory for the KV cache can't be had \(.*out of memory\): "
    ):
        lent.map()
    lent.unmap()
    assert gpu.calls == ["synchronize", "empty_cache", "map"] and peak_bytes(GPU) == 0
    gpu.free = FREE
    lent.map()
    assert gpu.free == FREE - (1 << 25)


def test_the_peak_is_of_both_together(gpu: Gpu) -> None:
    lent = Arena(GPU, 1000)
    gpu.torch_peak = 300
    assert peak_bytes(GPU) == 300
    lent.map()
    gpu.torch_peak = 200
    assert peak_bytes(torch.device("cuda", 0)) == 1200
    lent.unmap()
    gpu.torch_peak = 1100
    assert peak_bytes(GPU) == 1200
    gpu.torch_peak = 1300
    assert peak_bytes(GPU) == 1300
    restart_peak(GPU)
    assert peak_bytes(GPU) == 0


def test_a_gpu_is_asked_for_all_that_an_arena_does(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_no_arena(GPU) is None
    assert gpu.calls.count("map") == gpu.calls.count("unmap") == 3 and gpu.free == FREE
    assert gpu.calls[-1] == "destroy" and peak_bytes(GPU) == arena._PROBE_BYTES
    monkeypatch.setattr(gpu, "arena_tensor", lambda number: torch.zeros(7, dtype=torch.uint8))
    assert why_no_arena(GPU) == "its memory does not hold what is written"
    gpu.free = 0
    assert "out of memory" in str(why_no_arena(GPU))
    monkeypatch.setattr(arena, "_PROBE_BYTES", 1 << 50)
    assert why_no_arena(GPU) == "arena on GPU 0: reserving addresses failed: invalid value"


def test_a_build_without_cuda_has_none() -> None:
    if not torch.cuda.is_available():
        assert why_no_arena(GPU) == "the extension is built without CUDA"
