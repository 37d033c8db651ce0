"""Codecs: what comes back, what it costs, and what is refused."""

import io
import itertools
import math
import warnings

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes

from fedkit.data.names import check_names
from fedkit.errors import UsageError
from fedkit.knowledge.codecs import check_codec, make_codec, pack, payload_bytes, unpack
from fedkit.registry import names
from fedkit.settings import FederationSettings

# The machine may be busy: no example is too slow.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

SHAPES = st.tuples(st.integers(0, 8), st.integers(1, 12)) | st.just((2, 300))
MAX = float(np.finfo(np.float32).max)
HALF_MAX = float(np.finfo(np.float16).max)

ANY = ["float16", "float32", "int8", "topk:1", "topk:3", "topk:300"]
PROB = ["cfd:1", "cfd:2", "cfd:5", "cfd:8"]
CODECS = ANY + PROB
every_codec = pytest.mark.parametrize("codec", CODECS)

# Arrays of each codec for 3 x 4 logits.
NAMES = [(codec, name) for codec in CODECS for name in make_codec(codec).layout(3, 4)]
every_array = pytest.mark.parametrize(("codec", "name"), NAMES)


def matrices(largest=MAX):
    entries = st.floats(-largest, largest, width=32)
    return SHAPES.flatmap(lambda shape: arrays(np.float32, shape, elements=entries))


def normalised(weights):
    weights = weights.astype(np.float64)
    weights[weights.sum(axis=1) == 0] = 1
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def probabilities():
    entries = st.floats(0, 1, width=32)
    return SHAPES.flatmap(lambda shape: arrays(np.float32, shape, elements=entries)).map(normalised)


def carried(largest=HALF_MAX):
    """A codec, and rows that it carries."""
    return st.sampled_from(CODECS).flatmap(
        lambda codec: st.tuples(
            st.just(codec), probabilities() if codec in PROB else matrices(largest)
        )
    )


def there_and_back(codec, logits):
    return unpack(codec, pack(codec, logits), *logits.shape)


def sample(codec, rows=3, classes=4):
    """Rows on the simplex, all different: any codec carries them."""
    return normalised(np.random.default_rng(rows * classes).random((rows, classes)))


def changed(codec, **values):
    """A record of three samples and four classes, some of its arrays replaced."""
    record = pack(codec, sample(codec))
    for name, value in values.items():
        record[name] = value if isinstance(value, Array) else Array(np.array(value, order="C"))
    return record


def bits(numbers, width):
    digits = [int(digit) for n in numbers for digit in f"{n:0{width}b}"[::-1]]
    return np.packbits(digits, bitorder="little")


def test_these_are_all_codecs():
    assert names("codecs") == ("cfd", "float16", "float32", "int8", "topk")


# What comes back.


@given(matrices())
def test_float32_is_exact(logits):
    np.testing.assert_array_equal(there_and_back("float32", logits), logits)


@given(matrices(HALF_MAX))
def test_float16_keeps_its_error_bound(logits):
    back = there_and_back("float16", logits).astype(np.float64)
    # 2^-11 of the value; below 2^-14, where half precision has no more digits to give, 2^-25.
    bound = np.maximum(2.0**-11 * np.abs(logits.astype(np.float64)), 2.0**-25)
    assert (np.abs(back - logits) <= bound).all()


@given(matrices())
def test_float16_clips_to_its_range(logits):
    back = there_and_back("float16", logits)
    assert (np.abs(back) <= HALF_MAX).all()
    beyond = np.abs(logits) > HALF_MAX
    np.testing.assert_array_equal(back[beyond], np.sign(logits[beyond]) * HALF_MAX)


@given(matrices() | matrices(1.0))
def test_int8_keeps_its_error_bound(logits):
    back = there_and_back("int8", logits).astype(np.float64)
    exact = logits.astype(np.float64)
    low, high = exact.min(axis=1, keepdims=True), exact.max(axis=1, keepdims=True)
    rounding = np.maximum(2.0**-24 * np.maximum(-low, high), 2.0**-150)
    # A value midway between levels meets the bound, but for float64's own rounding.
    assert (np.abs(back - exact) <= ((high - low) / 510 + rounding) * (1 + 1e-12)).all()
    assert (back >= low).all()
    assert (back <= high).all()
    ends = (exact == low) | (exact == high)
    np.testing.assert_array_equal(back[ends], exact[ends])


@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-45, 0.1, -3e38, MAX])
def test_int8_is_exact_on_constant_rows(value):
    logits = np.full((2, 5), value, np.float32)
    np.testing.assert_array_equal(there_and_back("int8", logits), logits)


def test_int8_spans_all_of_float32():
    logits = np.array([[-MAX, 0, MAX], [-MAX, 1, 0]], np.float32)
    back = there_and_back("int8", logits)
    np.testing.assert_array_equal(back[:, 0], logits[:, 0])
    np.testing.assert_allclose(back[0, 1:], [MAX / 255, MAX], rtol=1e-6)


@given(st.sampled_from([1, 2, 5, 12, 300, 10**30]), matrices() | matrices(1.0) | probabilities())
def test_topk_keeps_the_largest_and_the_mean(count, logits):
    back = there_and_back(f"topk:{count}", logits).astype(np.float64)
    for found, row in zip(back, logits.astype(np.float64), strict=True):
        order = sorted(range(len(row)), key=lambda at: (-row[at], at))
        kept, others = order[:count], order[count:]
        np.testing.assert_array_equal(found[kept], row[kept])
        if others:
            rest = row[others]
            mean = math.fsum(rest) / len(rest)
            assert (found[others] == found[others[0]]).all()
            assert abs(found[others[0]] - mean) <= 2.0**-24 * np.abs(rest).max() + 2.0**-150
            assert rest.min() <= found[others[0]] <= rest.max()


def test_topk_keeps_the_lowest_of_equal_classes():
    logits = np.array([[1, 3, 3, 2, 3], [0, 0, 0, 0, 0]], np.float32)
    record = pack("topk:2", logits)
    np.testing.assert_array_equal(record["indices"].numpy(), [[1, 2], [0, 1]])
    np.testing.assert_array_equal(
        unpack("topk:2", record, 2, 5), [[2, 3, 3, 2, 2], [0, 0, 0, 0, 0]]
    )


@pytest.mark.parametrize(
    ("classes", "dtype"), [(1, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")]
)
def test_topk_takes_the_smallest_indices(classes, dtype):
    logits = np.arange(classes, dtype=np.float32)[None]
    record = pack("topk:1", logits)
    assert record["indices"].numpy().dtype == dtype
    assert unpack("topk:1", record, 1, classes).argmax() == classes - 1


@given(st.sampled_from(["topk:1", "topk:3", "topk:300", *PROB]), probabilities())
def test_rows_stay_on_the_simplex(codec, rows):
    back = there_and_back(codec, rows).astype(np.float64)
    assert (back >= 0).all()
    before = 1.0 if codec in PROB else rows.sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(back.sum(axis=1), before, rtol=0, atol=rows.shape[1] * 2.0**-25)


@given(st.integers(1, 8), probabilities())
def test_cfd_keeps_its_error_bound(count, rows):
    back = there_and_back(f"cfd:{count}", rows).astype(np.float64)
    steps = 2**count - 1
    np.testing.assert_array_equal(back, (np.rint(back * steps) / steps).astype(np.float32))
    exact = rows / rows.sum(axis=1, keepdims=True, dtype=np.float64)
    bound = (1 - 1 / rows.shape[1]) / steps + 2.0**-25
    assert (np.abs(back - exact) <= bound + 1e-12).all()


@pytest.mark.parametrize("count", [1, 2, 3])
@given(rows=arrays(np.float32, (3, 4), elements=st.floats(0, 1, width=32)).map(normalised))
def test_cfd_finds_the_nearest_point_of_the_simplex(count, rows):
    steps = 2**count - 1
    counts = itertools.product(range(steps + 1), repeat=4)
    points = np.array([point for point in counts if sum(point) == steps]) / steps
    back = there_and_back(f"cfd:{count}", rows).astype(np.float64)
    exact = rows / rows.sum(axis=1, keepdims=True, dtype=np.float64)
    nearest = np.linalg.norm(points - exact[:, None], axis=2).min(axis=1)
    np.testing.assert_allclose(np.linalg.norm(back - exact, axis=1), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("codec", "point"),
    [("cfd:1", [1, 0, 0, 0]), ("cfd:2", [1 / 3, 1 / 3, 1 / 3, 0]), ("cfd:8", [64, 64, 64, 63])],
)
def test_cfd_rounds_up_the_lowest_of_equal_classes(codec, point):
    back = there_and_back(codec, np.full((1, 4), 0.25, np.float32))
    np.testing.assert_allclose(back[0], np.array(point) / sum(point), rtol=1e-6)


@pytest.mark.parametrize("codec", PROB)
@pytest.mark.parametrize("factor", [0.999, 1.001, 3.0, 1e-30, 1e30])
def test_cfd_normalises_first(codec, factor):
    rows = np.array([[0.6, 0.3, 0.1, 0], [0.2, 0.2, 0.25, 0.35]], np.float32)
    scaled = (rows * np.float32(factor)).astype(np.float32)
    np.testing.assert_array_equal(there_and_back(codec, scaled), there_and_back(codec, rows))


@pytest.mark.parametrize("codec", PROB)
@pytest.mark.parametrize("row", [[0, 0], [-0.1, 1.1], [-1, -1], [np.nan, 1], [np.inf, 1]])
def test_cfd_refuses_what_is_no_probability(codec, row):
    with pytest.raises(ValueError, match="probabilities"):
        pack(codec, np.array([[0.5, 0.5], row], np.float32))


@given(carried())
def test_a_second_trip_changes_nothing(case):
    codec, logits = case
    once = there_and_back(codec, logits)
    twice = there_and_back(codec, once)
    if codec == "int8":
        # Levels nearer to each other than float32's own steps may change places: by one such step.
        largest = np.abs(once).max(axis=1, keepdims=True)
        narrow = np.ptp(once, axis=1, keepdims=True) < 2.0**-14 * largest
        bound = np.where(narrow, np.spacing(largest), 0)
        assert (np.abs(twice - once) <= bound).all()
    else:
        np.testing.assert_array_equal(twice, once)


@every_codec
def test_logits_come_back_as_float32(codec):
    back = there_and_back(codec, np.ones((3, 2), np.float32))
    assert back.dtype == np.float32
    assert back.flags.writeable


@every_codec
def test_slices_and_transposes_travel(codec):
    logits = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (logits[::2], logits[:, 1::2], logits.T):
        back = there_and_back(codec, view)
        np.testing.assert_array_equal(back, there_and_back(codec, view.copy("C")))
        if "float" in codec:
            np.testing.assert_array_equal(back, view)


# What it costs.


def bytes_of(codec, rows, classes):
    """As the docstrings say it."""
    name, _, argument = codec.partition(":")
    if name == "topk":
        kept = min(int(argument), classes)
        index = 1 if classes <= 256 else 2
        return rows * kept * (4 + index) + (4 * rows if kept < classes else 0)
    if name == "cfd":
        width = math.ceil(math.log2(classes)) if argument == "1" else classes * int(argument)
        return math.ceil(rows * width / 8)
    return {"float32": 4 * classes, "float16": 2 * classes, "int8": classes + 8}[name] * rows


@given(carried())
def test_costs_what_its_docstring_says(case):
    codec, logits = case
    record = pack(codec, logits)
    payload = sum(array.numpy().nbytes for array in record.values())
    assert payload == payload_bytes(codec, *logits.shape) == bytes_of(codec, *logits.shape)
    serialised = sum(len(array.data) for array in record.values())
    assert serialised == payload + 128 * len(record)


@given(carried())
def test_writes_its_layout(case):
    codec, logits = case
    found = {name: (a.dtype, a.shape) for name, a in pack(codec, logits).items()}
    assert found == make_codec(codec).layout(*logits.shape)


# What is refused.


@every_array
@pytest.mark.parametrize(
    "reshape",
    [lambda a: a[:-1], lambda a: a[None], lambda a: a[..., :-1], lambda a: a[0], lambda a: a[:0]],
    ids=["shorter", "deeper", "narrower", "a part", "empty"],
)
def test_another_shape_is_refused(codec, name, reshape):
    right = pack(codec, sample(codec))[name]
    with pytest.raises(ValueError, match="shape") as refusal:
        unpack(codec, changed(codec, **{name: reshape(right.numpy())}), 3, 4)
    assert str(right.shape) in str(refusal.value)


@every_array
@pytest.mark.parametrize(
    "dtype", ["?", "u1", "u2", "i4", "i8", "f2", "f4", "f8", "c8", ">f4", "U4"]
)
def test_another_type_is_refused(codec, name, dtype):
    right = pack(codec, sample(codec))[name]
    if np.dtype(dtype) == right.dtype:
        return
    with pytest.raises(ValueError, match=f"{name} is {np.dtype(dtype)}"):
        unpack(codec, changed(codec, **{name: np.zeros(right.shape, dtype)}), 3, 4)


@pytest.mark.parametrize(
    ("codec", "name"), [at for at in NAMES if at[1] in ("values", "ends", "rest")]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(codec, name, value):
    broken = pack(codec, sample(codec))[name].numpy()
    broken.flat[1] = value
    with pytest.raises(ValueError, match="not all finite"):
        unpack(codec, changed(codec, **{name: broken}), 3, 4)


@pytest.mark.parametrize("codec", ["topk:2", "topk:4"])
@pytest.mark.parametrize("first", [[4, 0], [255, 1], [1, 1]], ids=["next", "far", "repeated"])
def test_topk_refuses_indices_that_name_no_classes(codec, first):
    indices = pack(codec, sample(codec))["indices"].numpy()
    indices[0, :2] = first
    with pytest.raises(ValueError, match="different classes below 4"):
        unpack(codec, changed(codec, indices=indices), 3, 4)


@pytest.mark.parametrize(
    ("codec", "packed", "classes"),
    [
        ("cfd:1", bits([0, 5, 1], 3), 5),
        ("cfd:1", bits([7, 0, 1], 3), 5),
        ("cfd:2", bits([1, 1, 1, 0] * 2 + [1, 1, 1, 1], 2), 4),
        ("cfd:2", bits([0] * 12, 2), 4),
        ("cfd:8", np.full(12, 255, np.uint8), 4),
    ],
)
def test_cfd_refuses_what_is_no_point_of_the_simplex(codec, packed, classes):
    with pytest.raises(ValueError, match="no point of the simplex"):
        unpack(codec, ArrayRecord({"packed": Array(packed)}), 3, classes)


def test_cfd_packs_lowest_bits_first():
    packed = ArrayRecord({"packed": Array(bits([3, 0, 0, 1, 1, 1], 2))})
    np.testing.assert_allclose(unpack("cfd:2", packed, 2, 3), [[1, 0, 0], [1 / 3] * 3], rtol=1e-6)
    packed = ArrayRecord({"packed": Array(bits([299, 0], 9))})
    np.testing.assert_array_equal(unpack("cfd:1", packed, 2, 300).argmax(axis=1), [299, 0])


@every_array
def test_missing_and_foreign_arrays_are_refused(codec, name):
    without, foreign = changed(codec), changed(codec, scores=np.zeros(2))
    del without[name]
    for record in (without, foreign, ArrayRecord()):
        with pytest.raises(ValueError, match=rf"codec {codec}.*{name}"):
            unpack(codec, record, 3, 4)


def zipped(values):
    buffer = io.BytesIO()
    np.savez(buffer, values=values)
    return buffer.getvalue()


def claiming(shape):
    """The head of a file that promises more than there is."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


@every_array
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        pack("float32", np.zeros((3, 4), np.float32))["values"].data[:-1],
        b"\x80\x04not numpy",
        b"PK\x03\x04not a zip",
        zipped(np.zeros((3, 4), np.float32)),
        claiming((3, 4)),
        claiming((2**45, 2)),
        claiming((2**62, 2**62)),
    ],
    ids=["nothing", "head", "cut short", "pickle", "broken zip", "zip", "none", "huge", "vast"],
)
def test_bytes_that_are_no_array_are_refused(codec, name, data):
    dtype, shape = make_codec(codec).layout(3, 4)[name]
    with pytest.raises(ValueError, match=f"codec {codec}.*{name}"):
        unpack(codec, changed(codec, **{name: Array(dtype, shape, "numpy.ndarray", data)}), 3, 4)


@every_array
def test_a_wrong_description_is_refused_unread(codec, name, monkeypatch):
    monkeypatch.setattr(Array, "numpy", lambda array: pytest.fail("it was read"))
    for dtype, shape in (("float32", (2**40, 4)), ("float99", (3, 4)), ("", ())):
        record = changed(codec, **{name: Array(dtype, shape, "numpy.ndarray", b"")})
        with pytest.raises(ValueError, match="shape"):
            unpack(codec, record, 3, 4)


@every_array
def test_another_serialisation_is_refused(codec, name):
    dtype, shape = make_codec(codec).layout(3, 4)[name]
    with pytest.raises(ValueError, match=f"codec {codec}"):
        unpack(codec, changed(codec, **{name: Array(dtype, shape, "torch.tensor", b"")}), 3, 4)


def read_or_refuse(codec, record):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            logits = unpack(codec, record, 3, 4)
        except ValueError as refusal:
            assert "\n" not in str(refusal)
            return
    assert logits.dtype == np.float32
    assert logits.shape == (3, 4)
    assert np.isfinite(logits).all()


ANYTHING = scalar_dtypes().flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=0, min_side=0, max_side=4) | st.just((3, 4)))
)


@given(st.sampled_from(NAMES), ANYTHING)
def test_any_array_is_read_or_refused(which, values):
    codec, name = which
    read_or_refuse(codec, changed(codec, **{name: values}))


@given(st.sampled_from(CODECS), st.data())
def test_any_content_of_the_layout_is_read_or_refused(codec, data):
    layout = make_codec(codec).layout(3, 4)
    values = {name: data.draw(arrays(dtype, shape)) for name, (dtype, shape) in layout.items()}
    read_or_refuse(codec, changed(codec, **values))


@given(st.sampled_from(NAMES), st.data())
def test_any_bytes_are_read_or_refused(which, data):
    codec, name = which
    right = pack(codec, sample(codec))[name]
    whole = bytearray(right.data)
    start = data.draw(st.integers(0, len(whole)))
    foreign = data.draw(st.binary(max_size=40))
    whole[start : start + data.draw(st.integers(0, 40))] = foreign
    broken = Array(
        right.dtype,
        right.shape,
        "numpy.ndarray",
        data.draw(st.sampled_from([bytes(whole), foreign])),
    )
    read_or_refuse(codec, changed(codec, **{name: broken}))


# What may be asked for.


@pytest.mark.parametrize("codec", ["float32:", "float32:x", "float16:2", "int8:4"])
def test_an_argument_to_what_takes_none_is_refused(codec):
    name, _, argument = codec.partition(":")
    with pytest.raises(UsageError, match=f"codec {name} takes no argument, not '{argument}'"):
        check_codec(codec, "prob")


@pytest.mark.parametrize(
    "codec",
    [
        *("topk", "topk:", "topk:0", "topk:-1", "topk:x", "topk:1.5", "topk:1:2"),
        *("cfd", "cfd:", "cfd:0", "cfd:9", "cfd:-1", "cfd:x", "cfd:2.0"),
    ],
)
def test_a_bad_argument_is_refused_with_an_example(codec):
    name = codec.partition(":")[0]
    for check in (
        lambda: check_codec(codec, "prob"),
        lambda: check_names(FederationSettings(codec=codec)),
    ):
        with pytest.raises(UsageError, match=rf"The codec {name} takes .*, as in {name}:\d, not"):
            check()


def test_an_unknown_codec_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"no codec 'topq' \(did you mean topk"):
        check_codec("topq:3", "logit")


@every_codec
def test_only_probabilities_travel_as_probabilities(codec):
    check_codec(codec, "prob")
    check_names(FederationSettings(codec=codec))
    if codec in PROB:
        with pytest.raises(UsageError, match=f"{codec} carries probabilities only.*space=prob"):
            check_codec(codec, "logit")
    else:
        check_codec(codec, "logit")
