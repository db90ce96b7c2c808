import numpy as np
import torch

from dapo_megatron.weights.fingerprint import RunningFingerprint, fingerprint


def test_torch_numpy_and_bytes_agree():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert fingerprint(torch.from_numpy(array)) == fingerprint(array) == fingerprint(array.tobytes())
    assert len(fingerprint(array)) == 16


def test_bfloat16_is_hashed_by_its_raw_bytes():
    tensor = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.bfloat16)
    bits = np.array([0x3F80, 0xC000, 0x3F00, 0x4040], dtype="<u2")
    assert fingerprint(tensor) == fingerprint(bits.tobytes())


def test_strides_do_not_matter():
    tensor = torch.arange(12.0).reshape(3, 4)
    assert fingerprint(tensor.t().contiguous().t()) == fingerprint(tensor)
    assert fingerprint(np.asfortranarray(tensor.numpy())) == fingerprint(tensor)


def test_one_changed_bit_changes_it():
    array = np.zeros(1000, dtype=np.uint8)
    before = fingerprint(array)
    array[700] = 1
    assert fingerprint(array) != before


def test_running_fingerprint_of_row_pieces_is_that_of_the_whole():
    array = np.arange(40, dtype=np.float32).reshape(10, 4)
    running = RunningFingerprint()
    for start, stop in ((0, 1), (1, 7), (7, 10)):
        running.update(torch.from_numpy(array[start:stop]))
    assert running.hexdigest() == fingerprint(array)


def test_parameter_that_requires_grad_can_be_hashed():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert fingerprint(parameter) == fingerprint(np.ones(3, dtype=np.float32))
