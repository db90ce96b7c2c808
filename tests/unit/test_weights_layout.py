import pytest

from dapo_megatron.types import MappingError
from dapo_megatron.weights.layout import Condition, Run, compile_layout, fill_indices, index_values, parse_layout, parse_table


def test_plain_layout_is_one_run():
    compiled = compile_layout(parse_layout("h g*n*d"), {"h": 8, "g": 2, "n": 3, "d": 4})
    assert compiled.mcore_shape == (8, 24)
    assert compiled.part_shapes == (("", (8, 24)),)
    assert compiled.runs == (Run("", 0, 0, 8),)


def test_layout_without_columns_is_a_vector():
    compiled = compile_layout(parse_layout("(g [q:n*d | k:d])"), {"g": 2, "n": 2, "d": 3})
    assert compiled.mcore_shape == (18,)
    assert compiled.part_shapes == (("q", (12,)), ("k", (6,)))


def test_block_stacks_its_parts():
    compiled = compile_layout(parse_layout("[gate:f | up:2*f] h"), {"f": 3, "h": 5})
    assert compiled.mcore_shape == (9, 5)
    assert compiled.runs == (Run("gate", 0, 0, 3), Run("up", 0, 3, 6))


def test_repeated_block_interleaves_its_parts():
    compiled = compile_layout(parse_layout("(g [q:n*d | k:d | v:d]) h"), {"g": 2, "n": 2, "d": 4, "h": 3})
    assert compiled.runs == (
        Run("q", 0, 0, 8),
        Run("k", 0, 8, 4),
        Run("v", 0, 12, 4),
        Run("q", 8, 16, 8),
        Run("k", 4, 24, 4),
        Run("v", 4, 28, 4),
    )


def test_padding_is_read_from_the_layout():
    assert parse_layout("v h").padded == (False, False)
    assert parse_layout("v+pad h").padded == (True, False)
    assert parse_layout("h v+pad").padded == (False, True)
    assert parse_layout("(g [a:x | b:y])+pad h+pad").padded == (True, True)


@pytest.mark.parametrize("text", ["", "[q:d | ] h", "(g [q:d) h", "(g q:d) h", "h +pad", "h h h", "[q] h", "n*-d h"])
def test_layout_outside_the_language_is_refused(text):
    with pytest.raises(MappingError, match="cannot be read"):
        parse_layout(text)


def test_size_without_a_meaning_is_refused():
    with pytest.raises(MappingError, match=r"'n\*z' uses \['z'\]"):
        compile_layout(parse_layout("n*z h"), {"n": 2, "h": 3})


def test_table_is_read_line_by_line():
    rules = parse_table("""
        # comment
        a.{L}.qkv   b.{L}.{q,k}.weight   (g [q:n*d | k:d]) h

        head        lm_head              v+pad h   if not tied
    """)
    assert [rule.mcore_pattern for rule in rules] == ["a.{L}.qkv", "head"]
    assert rules[0].indices == ("L",)
    assert rules[0].hf_names() == {"q": "b.{L}.q.weight", "k": "b.{L}.k.weight"}
    assert rules[0].condition is None
    assert rules[1].condition == Condition("tied", value=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a b", "2 columns"),
        ("a b.{q,k} [k:d | q:d] h", "must be equal"),
        ("a b.{q,k} d h", "must be equal"),
        ("a b [q:d | k:d] h", "must be equal"),
        ("a.{L} b h", "same index letters"),
        ("a.{L} b.{E} h", "same index letters"),
        ("a.{layer} b.{layer} h", "braces"),
    ],
)
def test_table_line_with_names_that_do_not_fit_is_refused(line, message):
    with pytest.raises(MappingError, match=message):
        parse_table(line)


def test_two_index_letters_run_over_all_pairs():
    names = [fill_indices("l.{L}.e.{E}", values) for values in index_values(("L", "E"), {"L": 2, "E": 2})]
    assert names == ["l.0.e.0", "l.0.e.1", "l.1.e.0", "l.1.e.1"]
