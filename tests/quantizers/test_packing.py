import torch
from hypothesis import given
from hypothesis import strategies as st

from elips_torch.quantizers.packing import pack, packed_size, unpack


@given(
    bits=st.sampled_from([4, 6, 8]), n=st.integers(0, 5), count=st.integers(1, 13), seed=st.integers(0, 99)
)
def test_unpacking_undoes_packing(bits, n, count, seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 2**bits, (n, count), generator=generator, dtype=torch.uint8)
    packed = pack(numbers, bits)
    assert packed.shape == (n, packed_size(count, bits))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, count), numbers)


def test_low_bits_come_first():
    assert pack(torch.tensor([[1, 2]], dtype=torch.uint8), 4).tolist() == [[0x21]]
    # 6 bits each: 1 | 2 << 6 | 3 << 12 | 4 << 18, lowest byte first.
    word = 1 | 2 << 6 | 3 << 12 | 4 << 18
    assert pack(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8), 6).tolist() == [
        list(word.to_bytes(3, "little"))
    ]
