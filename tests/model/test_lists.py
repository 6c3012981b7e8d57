"""Small tensors on their way to a device."""

import torch

from thinktwice_fast.model.lists import float32, int64, pack, unpack, upload


def test_tensors_survive_the_transfer() -> None:
    tensors = [int64([3, -1, 2**40]), float32([0.5]), torch.empty(0, 2, dtype=torch.int32), torch.arange(6).view(2, 3)]
    packed = pack(tensors, pinned=False)
    for got, given in zip(unpack(packed, tensors), tensors, strict=True):
        assert got.dtype == given.dtype and torch.equal(got, given)
        assert got.untyped_storage().data_ptr() == packed.data_ptr()  # one transfer
        assert got.storage_offset() * got.itemsize % 16 == 0


def test_shapes_on_another_device() -> None:
    tensors = [int64([1, 2]), torch.zeros(3, 4, dtype=torch.int32)]
    there = upload(tensors, torch.device("meta"))
    assert [(x.shape, x.dtype, x.device.type) for x in there] == [(x.shape, x.dtype, "meta") for x in tensors]
