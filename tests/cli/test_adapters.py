import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rlora.cli.bench import adapters
from rlora.cli.bench.adapters import read_adapter


def case(dtype="F32", shape=(2, 4), offsets=(0, 32)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


A, B = "q.lora_A.weight", "q.lora_B.weight"
GOOD = {A: case(), B: case(shape=(4, 2), offsets=(32, 64))}
DATA = np.arange(16, dtype="<f4").tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_values_are_those_of_the_file(tmp_path, factors, dtype):
    wanted = {name: x.astype(dtype) for name, x in factors.items()}
    save_file(wanted, tmp_path / "x.safetensors")
    pairs = read_adapter(tmp_path / "x.safetensors")
    assert len(pairs) == 2
    for i, pair in enumerate(pairs):
        for letter, x in zip("AB", pair, strict=True):
            name = f"base_model.model.layers.{i}.q_proj.lora_{letter}.weight"
            np.testing.assert_array_equal(x, wanted[name].astype(x.dtype))
            assert x.dtype == (np.float64 if dtype is np.float64 else np.float32)


def test_kohya_names_alphas_and_flattened_kernels(tmp_path):
    rng = np.random.default_rng(1)
    down = rng.normal(size=(4, 8, 3, 3)).astype(np.float16)
    up = rng.normal(size=(6, 4, 1, 1)).astype(np.float16)
    layer = "lora_unet_down_blocks_0"
    tensors = {
        f"{layer}.lora_down.weight": down,
        f"{layer}.lora_up.weight": up,
        f"{layer}.alpha": np.array(4, np.int64),
    }
    save_file(tensors, tmp_path / "k.safetensors")
    (pair,) = read_adapter(tmp_path / "k.safetensors")
    np.testing.assert_array_equal(pair.A, down.reshape(4, 72).astype(np.float32))
    np.testing.assert_array_equal(pair.B, up.reshape(6, 4).astype(np.float32))


def te1(i):
    return f"lora_te1_text_model_encoder_layers_{i}_self_attn_q_proj"


FAMILIES = {
    "kohya's first text encoder": (te1, ".lora_down.weight", ".lora_up.weight"),
    "llama.cpp's GGUF": (lambda i: f"blk.{i}.attn_q.weight", ".lora_a", ".lora_b"),
    "PEFT's": (lambda i: f"base_model.model.{i}.q_proj", ".lora_A.weight", ".lora_B.weight"),
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_ranks_that_differ_by_layer_and_alphas(tmp_path, family, dtype):
    """An alpha is no factor, whatever its shape and dtype."""
    layer, down, up = family
    rng = np.random.default_rng(0)
    tensors = {}
    for i, r in enumerate((1, 3, 8)):
        tensors[layer(i) + down] = rng.normal(size=(r, 8)).astype(dtype)
        tensors[layer(i) + up] = rng.normal(size=(6, r)).astype(dtype)
        tensors[layer(i) + ".alpha"] = np.full((), r, dtype)
    save_file(tensors, tmp_path / "x.safetensors")
    pairs = read_adapter(tmp_path / "x.safetensors")
    found = {len(pair.A): pair for pair in pairs}
    assert sorted(found) == [1, 3, 8]
    for i, r in enumerate((1, 3, 8)):
        np.testing.assert_array_equal(found[r].A, tensors[layer(i) + down].astype(np.float32))
        np.testing.assert_array_equal(found[r].B, tensors[layer(i) + up].astype(np.float32))


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04" + bytes(60), b"\x80\x02}q\x00." + bytes(60)]
)
@pytest.mark.parametrize("name", ["adapter_model.bin", "x.safetensors"])
def test_an_empty_file_and_a_pickle_are_refused(tmp_path, content, name):
    """Nothing is unpickled: the first bytes are no length of a header."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="safetensors"):
        read_adapter(tmp_path / name)


@pytest.mark.parametrize("name", adapters.ADAPTER_NAMES)
def test_a_directory_stands_for_the_file_in_it(tmp_path, factors, name):
    save_file(factors, tmp_path / name)
    assert len(read_adapter(tmp_path)) == 2


def test_the_handwritten_file_is_sound(hostile):
    """The hostile ones below differ from it in one thing each."""
    (pair,) = read_adapter(hostile(GOOD, DATA))
    np.testing.assert_array_equal(pair.A, np.arange(8).reshape(2, 4))


# safetensors gives the reasons, in the words that it has from 0.6 on; ours stand before them.
HOSTILE = {
    "empty": (b"", b"", None, "JSON in header: EOF"),
    "header longer than the file": (GOOD, DATA, 10_000, "invalid header length"),
    "header of 16 EiB": (GOOD, DATA, 2**64 - 1, "header too large"),
    "not JSON": (b"pickle!!", b"", None, "JSON in header: expected value"),
    "not text": (b"\xff\xfe\x00\x01", b"", None, "invalid UTF-8 in header"),
    "nested too deep": (b"[" * 200_000, b"", None, "JSON in header: invalid type: sequence"),
    "a list": (b"[]", b"", None, "JSON in header: invalid type: sequence"),
    "a name twice": (
        b'{"x": %s, "x": %s}' % ((json.dumps(case()).encode(),) * 2),
        DATA,
        None,
        "file not fully covered",
    ),
    "data cut short": (GOOD, DATA[:-4], None, "file not fully covered"),
    "data left over": (GOOD, DATA + b"1234", None, "file not fully covered"),
    "negative offset": (
        {**GOOD, A: case(offsets=(-32, 0))},
        DATA,
        None,
        "invalid value: integer `-32`",
    ),
    "backward offsets": (
        {**GOOD, A: case(offsets=(32, 0))},
        DATA,
        None,
        "invalid offset for tensor `q.lora_A.weight`",
    ),
    "overlap": (
        {**GOOD, B: case(shape=(4, 2))},
        DATA[:32],
        None,
        "invalid offset for tensor `q.lora_",  # either of the two, at random
    ),
    "gap": (
        {**GOOD, B: case(shape=(4, 2), offsets=(36, 68))},
        DATA + b"1234",
        None,
        "invalid offset for tensor `q.lora_B.weight`",
    ),
    "unknown dtype": ({**GOOD, A: case(dtype="F31")}, DATA, None, "unknown variant `F31`"),
    "dtype no text": (
        {**GOOD, A: case(dtype=["F32"])},
        DATA,
        None,
        "invalid type: sequence, expected string",
    ),
    "wrong size": (
        {**GOOD, A: case(dtype="F64")},
        DATA,
        None,
        "invalid shape, data type, or offset",
    ),
    "shape of truths": (
        {**GOOD, A: case(shape=(True, 4))},
        DATA,
        None,
        "invalid type: boolean `true`",
    ),
    "monstrous shape": (
        {**GOOD, A: case(shape=(2**62,) * 5)},
        DATA,
        None,
        "overflow computing buffer size",
    ),
    "no offsets": (
        {**GOOD, A: {"dtype": "F32", "shape": [2, 4]}},
        DATA,
        None,
        "missing field `data_offsets`",
    ),
    "case is a number": ({**GOOD, A: 1}, DATA, None, "invalid type: integer `1`"),
    "integers as factors": ({n: {**e, "dtype": "I32"} for n, e in GOOD.items()}, DATA, None, "I32"),
    "NaN": (GOOD, np.full(16, np.nan, "<f4").tobytes(), None, "NaN"),
    "no pair": ({"weight": case()}, DATA[:32], None, "no LoRA pair"),
    "escape codes in a name": ({"\x1b[31m\nred": case()}, DATA[:32], None, "no LoRA pair"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_one_line(hostile, refused, tmp_path, kind):
    header, data, length, why = HOSTILE[kind]
    path = hostile(header, data, length)
    message = refused("bench", "--adapter", path, "--output", tmp_path / "out.json")
    assert why in message
    ours = "tensor '", "no LoRA pair"
    assert "no sound safetensors file: " in message or any(words in message for words in ours)
    assert message[:-1].isprintable()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_header_above_the_limit_of_the_format_is_not_read(hostile):
    """100 MB, although the file has them: JSON of a header takes some times its size in memory."""
    limit = 100_000_000
    path = hostile(b"", length=limit + 1)
    with path.open("r+b") as file:
        file.truncate(8 + limit + 1)  # sparse
    with pytest.raises(ValueError, match="header too large"):
        read_adapter(path)
    path = hostile(b"", length=limit)
    with path.open("r+b") as file:
        file.truncate(8 + limit - 1)
    with pytest.raises(ValueError, match="invalid header length"):
        read_adapter(path)


def test_a_file_of_three_bytes_is_refused(tmp_path, refused):
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    message = refused("bench", "--adapter", tmp_path / "x.safetensors")
    assert "no sound safetensors file" in message
    assert "header too small" in message


def test_what_is_no_adapter_file_is_refused(tmp_path, refused):
    assert "adapter_model.safetensors" in refused("bench", "--adapter", tmp_path)
    message = refused("bench", "--adapter", "nope")
    assert "--adapter nope: No such file or folder" in message
    assert "a safetensors file, or a folder that has adapter_model.safetensors or" in message
    if Path("/dev/zero").exists():
        assert "no regular file" in refused("bench", "--adapter", "/dev/zero")
