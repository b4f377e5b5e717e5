from elips_torch.kernels.address_width import narrow_products

# As Triton writes them, shortened.
WIDE = """
    %rows = arith.muli %row_block, %c128_i32 : i32 loc(#loc89)
    %wide = arith.extsi %rows : i32 to i64 loc(#loc93)
    %stride = arith.extsi %code_stride : i32 to i64 loc(#loc93)
    %place = arith.muli %wide, %stride : i64 loc(#loc93)
    %query = arith.extsi %queries : tensor<128xi32> to tensor<128xi64> loc(#loc93)
    %more = tt.splat %stride : i64 -> tensor<128xi64> loc(#loc93)
    %places = arith.muli %query, %more : tensor<128xi64> loc(#loc93)
"""
NARROW = """
    %stride = tt.splat %row_stride : i32 -> tensor<128xi32> loc(#loc93)
    %place = arith.muli %rows, %stride : tensor<128xi32> loc("place"(#loc93))
    %wide = arith.extsi %place : tensor<128xi32> to tensor<128xi64> loc(#loc93)
"""


def test_products_in_64_bits_are_fine():
    assert narrow_products(WIDE) == ()


def test_products_in_32_bits_are_seen_also_where_they_are_widened_later():
    assert narrow_products(NARROW) == ("%place",)
    for length in ("dim", "n_groups", "maxima_stride"):
        assert narrow_products(NARROW.replace("row_stride", length)) == ("%place",)


def test_values_read_from_memory_may_be_multiplied():
    code = """
    %ptrs = tt.addptr %codes_ptr, %code_stride : tensor<8x!tt.ptr<i8>>, tensor<8xi32>
    %codes = tt.load %ptrs : tensor<8x!tt.ptr<i8>>
    %wide = arith.extsi %codes : tensor<8xi8> to tensor<8xi32>
    %sums = arith.muli %wide, %wide : tensor<8xi32>
    """
    assert narrow_products(code) == ()


def test_what_counts_blocks_may_be_narrow():
    assert narrow_products(NARROW.replace("row_stride", "part_size")) == ()
