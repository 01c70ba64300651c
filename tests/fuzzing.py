# SPDX-License-Identifier: Apache-2.0
"""What strangers may feed in: generators of bad input, and what must come of it.

Every reader of `READERS` has a strategy of cases and a function that tries one case in
a folder: "accepted" or "refused". Accepted input must be what the rest of the package
relies on; refused input must be one error of our own that says what to do. All else is
an exception: a crash. The tests run a few hundred cases of each, `benchmarks/fuzz.py`
thousands.
"""

import contextlib
import copy
import errno
import io
import json
import os
import re
import shutil
import struct
import sys
import traceback
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from PIL import Image

ROOT = Path(__file__).parent.parent
SIDE = 8
# What a sentence has that says what to do.
_HELP = re.compile(
    r"expected|must |is needed|mend |choose|known|pass |set it|needs|fetch|download"
    r"|install|Load the|unpack|[Rr]e-save|write "
)


class Reader(NamedTuple):
    """`attempt(case, folder)` is "accepted" or "refused", or raises: a crash."""

    cases: st.SearchStrategy
    attempt: Callable[[Any, Path], str]


def check_error(error, path=""):
    """One error of our own types: with what was wrong, where, and what to do."""
    from vpt_jax.weights.readers import CheckpointError

    text = str(error)
    # UnicodeError and JSONDecodeError are ValueErrors that nobody meant for a user.
    assert type(error) in (ValueError, CheckpointError), repr(error)
    # What only tests raise must not be why something is refused.
    assert not isinstance(error.__cause__, Warning | AssertionError)
    assert "TypeCheckError" not in text and "Traceback" not in text
    assert str(path) in text, f"does not name the file: {text}"
    assert _HELP.search(text), f"does not say what to do: {text}"
    assert len(text) < 6000, f"{len(text)} characters"
    text.encode()  # can be printed and written
    assert "\n" not in text, f"more than one line: {text}"


@contextlib.contextmanager
def or_refused(path: Any = ""):
    """Yields a list that has "refused" in it if an error of our own was raised."""
    outcome = []
    try:
        yield outcome
    except ValueError as error:
        check_error(error, path)
        outcome.append("refused")


# --- bytes ----------------------------------------------------------------------------

NUMBERS = [0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]
NUMBERS += [2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def changed(data, rng):
    """One of the many ways in which a file can be wrong."""
    data = bytearray(data)
    size = len(data)
    near = rng.choice([size, min(size, 120)])  # half of them at the start or the end
    at = int(rng.integers(near))
    at = size - 1 - at if rng.random() < 0.5 else at
    end = at + int(rng.integers(1, 1 + min(size - at, rng.choice([4, 64]))))
    kind = rng.integers(8)
    if kind < 2:
        for i in [at] if kind else rng.integers(size, size=rng.integers(2, 9)):
            data[i] ^= 1 << rng.integers(8)
    elif kind == 2:
        del data[at : rng.choice([end, size])]
    elif kind == 3:
        data[at:end] = rng.bytes(end - at)
    elif kind == 4:
        data[at:end] = bytes([rng.choice([0, 255])]) * (end - at)
    elif kind == 5:
        data[at:at] = rng.bytes(end - at)
    elif kind == 6:
        source = int(rng.integers(size))
        data[at:at] = data[source : source + end - at]
    else:
        width = int(rng.choice([1, 2, 4, 8]))
        number = NUMBERS[rng.integers(len(NUMBERS))] % 256**width
        data[at : at + width] = number.to_bytes(width, rng.choice(["little", "big"]))
    return bytes(data)


def damage(data):
    """Some of the files are damaged."""

    def apply(content, seed):
        damaged = seed is not None and content
        return changed(content, np.random.default_rng(seed)) if damaged else content

    return st.builds(apply, data, st.none() | st.integers(0, 2**32 - 1))


# --- configs --------------------------------------------------------------------------

_WORDS = (
    "removal taylor global layer sgd adamw step epoch linear random error last_finite"
    " B/16 demo/4 Swin-B digits folder svhn all select final cls mean half imagenet"
    " bfloat16 published sweep default mean_abs squash crop corner ../.. /dev/zero nan"
).split()
_NUMBERS = (
    st.sampled_from([0, 1, -1, 2, 0.0, 0.5, 1.0, -0.5, 1e30, 1e-320, *NUMBERS, 10**400])
    | st.integers()
    | st.floats()
)
_TEXTS = st.sampled_from(_WORDS) | st.text(max_size=12)
_PLAIN = st.none() | st.booleans() | _NUMBERS | _TEXTS
VALUES = st.recursive(
    _PLAIN,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(_TEXTS | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


def load_config(name):
    """`"demo.py:smoke"` of configs/ as nested dicts."""
    path, _, arg = name.partition(":")
    module = {}
    exec(compile((ROOT / "configs" / path).read_text(), path, "exec"), module)
    return module["get_config"](arg).to_dict()


def _places(values, prefix=()):
    found = []
    for key, value in values.items():
        found.append((*prefix, key))
        found += _places(value, (*prefix, key)) if isinstance(value, dict) else []
    return found


def _at(values, place):
    for key in place:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def edited(name):
    """A config of ours after one to three edits: values, unknown and missing keys."""
    base = load_config(name)
    places = _places(base)
    edit = st.tuples(
        st.sampled_from([*places, ("unknown",), ("tune", "unknown")]),
        st.sampled_from(["set", "set", "set", "drop", "copy"]),
        VALUES,
        st.sampled_from(places),
    )

    def apply(edits):
        values = copy.deepcopy(base)
        for (*groups, key), action, value, other in edits:
            group = _at(values, groups)
            if not isinstance(group, dict):
                continue  # an edit before removed it
            if action == "drop":
                group.pop(key, None)
            else:
                copied = action == "copy"
                group[key] = copy.deepcopy(_at(base, other)) if copied else value
        return values

    return st.lists(edit, min_size=1, max_size=3).map(apply)


def try_config(values, folder):
    """`parsing.parse`: what it accepts can be written down and read again."""
    from vpt_jax.run import parsing

    with or_refused() as outcome:
        parsed = parsing.parse(values)
        text = json.dumps(parsing.to_dict(parsed), allow_nan=False)
        assert parsing.parse(json.loads(text)) == parsed
        outcome.append("accepted")
    return outcome[0]


def try_protocol(values, folder):
    """`protocol.parse`: every run has a folder of its own under the workdir."""
    from vpt_jax.bench import protocol

    with or_refused() as outcome:
        bench = protocol.parse(values)
        names = [job.name for job in protocol.planned(bench)]
        assert len(set(names)) == len(names)
        for name in names:
            inside = os.path.normpath(os.path.join("/runs", name))
            assert inside.startswith("/runs/") and inside.count("/") == 3, name
            os.fsencode(name)
        outcome.append("accepted")
    return outcome[0]


# --- flags ----------------------------------------------------------------------------

_FLAG_VALUES = (
    st.sampled_from(["", "0", "-1", "nan", "inf", "1e999", "None", "()", "(0,0)", "0x"])
    | _NUMBERS.map(lambda x: str(x)[:1000])
    | _TEXTS
    | VALUES.map(lambda x: repr(x)[:1000])
    | st.sampled_from(["(" * 300, "[" * 5000, "9" * 5000, "\ud800", "a\nb"])
)
_FLAG_NAMES = st.sampled_from(
    [".".join(map(str, place)) for place in _places(load_config("demo.py:smoke"))]
    + ["tune.unknown", "unknown", "tune..epochs", "", "tune.epochs.x", "seeds[0]"]
).map(lambda name: f"--config.{name}=")
_OTHER_FLAGS = st.sampled_from(
    "--unknown --workdir --traceback=7 -x word --config --seeds=1 --config= --noconfig"
    " --config=configs/absent.py --config=configs/demo.py:absent --config=README.md"
    " --config=configs --config.tune.epochs -- --launcher=moon --list --address=x"
    " --list=maybe".split()
)
ARGUMENTS = st.lists(
    st.builds(str.__add__, _FLAG_NAMES, _FLAG_VALUES) | _OTHER_FLAGS,
    min_size=1,
    max_size=3,
).map(lambda words: [w.replace("\0", "0") for w in words])


def try_flags(arguments, folder):
    """The command line in a child process, up to where the config is checked.

    Only for a process that has not started JAX: the child is a fork.
    """
    from vpt_jax import main  # noqa: F401

    # They are imported before the fork, else it would be done in each.
    errors = folder / "stderr"
    child = os.fork()
    if not child:
        code = 99
        try:
            with open(errors, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = (
                io.TextIOWrapper(io.FileIO(fd, "w"), "utf-8", "backslashreplace")
                for fd in (1, 2)
            )
            _command_line(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code or 0, int) else 98
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code or 0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = errors.read_text(errors="replace")
    if code == 0:
        return "accepted"
    assert code == 2, f"exit code {code}: {text}"
    if "--traceback" not in " ".join(arguments):
        assert "Traceback" not in text, text
        assert text.startswith("error: ") and text.count("\n") == 1, text
    return "refused"


def _command_line(arguments):
    from vpt_jax import main
    from vpt_jax.files import cli
    from vpt_jax.run import parsing

    def only_parse(values: Any, workdir: Path, command: str) -> None:
        # What the command does before it loads anything.
        if main.LIST.value or main.LAUNCHER.value != "here" or main.ADDRESS.value:
            raise ValueError("--list is for benchmarks; leave it out.")
        parsing.parse(values)

    os.chdir(ROOT)
    cli.keep_compiled = lambda: None
    sys.argv = ["main", "--config=configs/demo.py:smoke", *arguments]
    cli.start(only_parse)


# --- files of prompts -----------------------------------------------------------------


def prompt_arrays():
    """Of two layers and three classes."""
    rng = np.random.default_rng(0)
    shapes = {"prompts/00": (2, 4), "prompts/01": (1, 4), "head/kernel": (4, 3)}
    arrays = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    return arrays | {"head/bias": np.zeros(3, np.float32)}


def prompt_header():
    text = {"backbone": "tiny", "backbone_hash": "abc", "variant": "demo/4"}
    text |= {"readout": "cls", "normalisation": "half", "resize": "crop"}
    text |= {"source": "hf://org/name/tiny.npz"}
    return text | {
        "version": 1,
        "image_size": 8,
        "class_names": ["a", "b", "c"],
        "counts": [2, 1],
        "deep": True,
        "model": {"depth": 2},
        "load": {"norm": "before", "skip": ["head"]},
    }


def safetensors_of(
    arrays: dict[str, np.ndarray], metadata: Any, edits: dict | None = None
) -> bytes:
    """A safetensors file, of which entries of the header may be replaced."""
    header, at = {"__metadata__": metadata}, 0
    for name, array in arrays.items():
        kind = {"f": "F", "i": "I", "u": "U"}[array.dtype.kind]
        header[name] = {
            "dtype": f"{kind}{8 * array.dtype.itemsize}",
            "shape": list(array.shape),
            "data_offsets": [at, at := at + array.nbytes],
        }
    for (name, key), value in (edits or {}).items():
        if isinstance(header.get(name), dict):
            header[name][key] = value
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in arrays.values())
    return struct.pack("<Q", len(text)) + text + data


def _json(values):
    def possible(value):
        try:
            return bool(json.dumps(value))
        except (TypeError, ValueError):
            return False

    return values.filter(possible)


_SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
_BAD_FLOATS = st.sampled_from([np.nan, np.inf, -np.inf, 1e38])


def _prompt_file(header, left_out, odd, number, edits, raw):
    arrays = prompt_arrays()
    if odd:
        name, shape, dtype = odd
        arrays[name] = np.zeros(shape, dtype)
    if number is not None:
        name, value = number
        if arrays[name].size and arrays[name].dtype.kind == "f":
            with np.errstate(over="ignore"):  # in half precision
                arrays[name].flat[0] = value
    own = prompt_header() | header
    text = json.dumps({k: v for k, v in own.items() if k not in left_out})
    metadata = {"vpt_jax": text if raw is None else raw} if raw != "none" else {}
    return safetensors_of(arrays, metadata, edits)


_NAMES = st.sampled_from([*prompt_arrays(), "prompts/02", "extra"])
PROMPT_FILES = damage(
    st.builds(
        _prompt_file,
        st.dictionaries(st.sampled_from([*prompt_header()]), _json(VALUES), max_size=2),
        st.sets(st.sampled_from([*prompt_header()]), max_size=1),
        st.none()
        | st.tuples(_NAMES, _SHAPES, st.sampled_from(["f4", "f8", "i4", "u1", "f2"])),
        st.none() | st.tuples(st.sampled_from([*prompt_arrays()]), _BAD_FLOATS),
        st.dictionaries(
            st.tuples(
                st.sampled_from([*prompt_arrays(), "__metadata__"]),
                st.sampled_from(["dtype", "shape", "data_offsets", "vpt_jax"]),
            ),
            _json(VALUES) | st.just([10**18, 10**18]),
            max_size=1,
        ),
        st.none()
        | st.sampled_from(["", "[]", "null", "7", "{", "[" * 9000, "none", '"x"']),
    )
)


def try_prompts(data, folder):
    """`load_prompts`: what it accepts can be applied, and is finite."""
    from vpt_jax import counts, load_prompts

    path = folder / "some.prompts"
    path.write_bytes(data)
    with or_refused(path) as outcome:
        prompts, head, header = load_prompts(path, backbone="abc")
        assert list(counts(prompts)) == header["counts"]
        assert all(p.ndim == 2 and p.dtype == np.float32 for p in prompts)
        width, classes = head["kernel"].shape
        assert head["bias"].shape == (classes,) == (len(header["class_names"]),)
        for array in (*prompts, *head.values()):
            assert np.isfinite(np.asarray(array)).all()
        outcome.append("accepted")
    return outcome[0]


# --- files of weights -----------------------------------------------------------------


def _weights():
    import weight_files

    def make(kind, seed):
        rng = np.random.default_rng(seed)
        write = weight_files.FUZZED[kind][0]
        return write(lambda d: d if seed is None else changed(d, rng))

    kinds = st.sampled_from(list(weight_files.FUZZED))
    return st.builds(make, kinds, st.none() | st.integers(0, 2**32 - 1))


def try_weights(data, folder):
    """`read_arrays` of all formats."""
    from vpt_jax.weights.readers import read_arrays

    path = folder / "weights"
    path.write_bytes(data)
    with or_refused(path) as outcome:
        arrays, _ = read_arrays(path)
        for array in arrays.values():
            assert type(array) is np.ndarray and not array.dtype.hasobject
        outcome.append("accepted")
    return outcome[0]


# --- pictures -------------------------------------------------------------------------


def png(width, height, rows=0, depth=8, colour=2):
    """A PNG that states a size and has `rows` black rows of it: some 1/1000 of them."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    line = bytes(1 + (width * channels * depth + 7) // 8)
    packer = zlib.compressobj()
    body = b"".join(packer.compress(line) for _ in range(rows)) + packer.flush()
    palette = [(b"PLTE", bytes(768))] if colour == 3 else []
    return png_of((width, height, depth, colour), [*palette, (b"IDAT", body)])


def png_of(head, chunks):
    """A PNG of `(width, height, depth, colour)` and chunks of a kind and data."""
    out = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">2I5B", *head, 0, 0, 0)
    for kind, data in [(b"IHDR", header), *chunks, (b"IEND", b"")]:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        out += struct.pack(">I", len(data)) + kind + data + crc
    return out


def tiff(height, width, tags, data, order="<", strips=()) -> bytes:
    """A TIFF of one page; values of `tags` are numbers, or a type and numbers."""
    strips = strips or [len(data)]
    entries = {256: (4, [width]), 257: (4, [height]), 279: (4, list(strips))}
    for tag, value in tags.items():
        entries[int(tag)] = (3, [value]) if isinstance(value, int) else value

    def directory(first: int) -> bytes:
        starts = [first + sum(strips[:k]) for k in range(len(strips))]
        found = sorted((entries | {273: (4, starts)}).items())
        at = 8 + 2 + 12 * len(found) + 4
        head, rest = struct.pack(order + "H", len(found)), b""
        for tag, (kind, values) in found:
            form = f"{order}{len(values)}{'HI'[kind - 3]}"
            value = struct.pack(form, *values)
            if len(value) > 4:
                value, rest = struct.pack(order + "I", at + len(rest)), rest + value
            head += struct.pack(order + "HHI", tag, kind, len(values))
            head += value.ljust(4, b"\0")
        return head + bytes(4) + rest

    first = 8 + len(directory(0))
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", 8) + directory(first) + data


def picture(format, mode, side=9):
    """A small sound file, or as near to it as the format has the mode."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side + 2, 3), np.uint8)
    out, image = io.BytesIO(), Image.fromarray(pixels)
    for wanted in (mode, "RGB"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            image.convert(wanted).save(out, format)
            return out.getvalue()
    raise AssertionError(format)


_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "EPS")
_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I", "F", "I;16")
SOUND = {(f, m): picture(f, m) for f in _FORMATS for m in _MODES}
_SIZES = st.sampled_from([0, 1, 2, 9, 300, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1])
PICTURES = damage(
    st.sampled_from(list(SOUND.values()))
    | st.builds(
        png,
        st.sampled_from([0, 1, 9, 300, 65536]),
        _SIZES,
        st.integers(0, 9),
        st.sampled_from([1, 8, 16, 7]),
        st.sampled_from([0, 2, 3, 4, 6, 5]),
    )
)


def try_picture(data, folder):
    """`read_picture` by all rules."""
    from vpt_jax.data import pictures

    path = folder / "a.png"
    path.write_bytes(data)
    outcomes = set()
    for rule in pictures.RULES:
        with or_refused(path) as outcome:
            found = pictures.read_picture(path, SIDE, rule)
            assert found.shape == (SIDE, SIDE, 3) and found.dtype == np.uint8
            outcome.append("accepted")
        outcomes |= set(outcome)
    return max(outcomes)  # refused, if by any rule


# --- folders --------------------------------------------------------------------------

_PLAIN_PARTS = (
    "train val test valid Train @eaDir cat dog a.png b.png c.JPG d.gif .hidden f.txt"
    " classes.txt train.txt \u00e9.png e\u0301.png - %s.png"
).split()
_ODD_PARTS = ["e.png\n", os.fsdecode(b"\xff.png"), "two words.png", "\x1b[31m.png"]
_PARTS = st.sampled_from([*_PLAIN_PARTS, *_ODD_PARTS, "n" * 200])
_PARTS |= st.text(min_size=1, max_size=4)
_KINDS = st.sampled_from(
    ["picture"] * 8 + ["broken", "empty", "folder", "pipe", "loop", "up", "zero"]
)
_ROOTS = st.sampled_from(
    [[], ["train"], ["train", "cat"], ["val", "dog"], ["cat"], ["dog"], ["emu"]]
)
_ENTRIES = st.tuples(
    st.builds(list.__add__, _ROOTS, st.lists(_PARTS, min_size=1, max_size=3)), _KINDS
)
_GOOD = [
    ([*split, kind, f"{k}.png"], "picture")
    for split in ([], ["train"])
    for kind in ("cat", "dog")
    for k in "1234"
]
TREES = st.builds(
    list.__add__,
    st.sampled_from([[], _GOOD[:8], _GOOD[8:]]),
    st.lists(_ENTRIES, max_size=8),
)


def put(root, parts, kind):
    """Makes one entry; what cannot be made is left out."""
    parts = [p.replace("/", "_").replace("\0", "0") for p in parts]
    parts = [p for p in parts if p not in (".", "..")]
    if not parts:
        return
    path = root.joinpath(*parts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "folder":
            path.mkdir(exist_ok=True)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind in ("loop", "up", "zero"):
            target = {"loop": path.name, "up": "..", "zero": "/dev/zero"}[kind]
            path.symlink_to(target)
        elif not os.path.lexists(path):
            sound = SOUND["PNG", "RGB"]
            size = {"picture": None, "broken": 60, "empty": 0}[kind]
            path.write_bytes(sound[:size])
    except (OSError, ValueError) as error:  # too long, a file is in the way, surrogates
        codes = (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
        if isinstance(error, OSError) and error.errno not in (*codes, errno.EISDIR):
            raise


def try_folder(entries, folder):
    """`folder.load` of class folders: labels are of the classes, all can be printed."""
    root = folder / "data"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for parts, kind in entries:
        put(root, parts, kind)
    return load_folder(root, folder, bool(len(entries) % 2))


def load_folder(path, folder, skip_broken=False):
    """`folder.load`, with a cache that is thrown away."""
    from vpt_jax.data import folder as own

    said, cache = [], folder / "cache"
    options = {"skip_broken": skip_broken, "report": said.append}
    os.environ["VPT_JAX_CACHE"] = str(cache)
    try:
        with or_refused(path) as outcome:
            loaded = own.load(str(path), SIDE, **options)
            for images, labels in loaded.splits.values():
                assert images.shape == (len(labels), SIDE, SIDE, 3)
                assert labels.dtype == np.int32 and labels.min() >= 0
                assert labels.max() < len(loaded.class_names)
            said += loaded.class_names
            outcome.append("accepted")
    finally:
        del os.environ["VPT_JAX_CACHE"]
        shutil.rmtree(cache, ignore_errors=True)
    for text in said:
        assert "\n" not in text and "\x1b" not in text
        text.encode()
    return outcome[0]


_ROWS = (
    "a.png 0;b.png 1;a/c.png 2;gone.png 1;b.png;1; ;a.png -1;/etc/passwd 0;../x.png 1"
    ";a.png 99999999999;a.png ١;a.png 0.5;pipe 1;\x00 1;b.png\t1;/dev/zero 1;\ufeff 0"
    ";images/../../up.png 0;loop 1"
).split(";")
_ROWS += ["a.png " + "9" * 5000, "n" * 5000 + " 0"]
_LINES = st.lists(st.sampled_from(_ROWS) | st.text(max_size=8), max_size=9)
_TEXT = _LINES.map(lambda lines: "\n".join(lines).encode(errors="surrogatepass"))
_JSON = st.one_of(
    st.dictionaries(
        st.sampled_from(["a.png", "a/c.png", "../x.png", "\ud800", "\0", ""]),
        st.sampled_from([0, 1, -1, 2**70, 0.5, True, None, "cat", "1", [], "\ud800"]),
    ).map(lambda rows: json.dumps(rows).encode()),
    st.sampled_from([b"[" * 9999, b"NaN", b"[[]]", b'"', b"[1,2]", b'[["a.png", 1]]']),
)
LISTS = st.fixed_dictionaries(
    {"train.txt": st.just(b"a.png 0\nb.png 1\nb.png 1\nb.png 1\n") | damage(_TEXT)},
    optional={
        "val.txt": damage(_TEXT),
        "test.txt": st.just(b"a.png 0\n") | damage(_TEXT),
        "train800.txt": damage(_TEXT),
        "val.json": st.just(b'{"a.png": 0, "b.png": 1}') | damage(_JSON),
        "classes.txt": st.just(b"cat\ndog\nemu\n") | damage(_TEXT),
    },
)


def try_lists(files, folder):
    """`folder.load` of lists of paths and labels."""
    root = folder / "lists"
    if not root.exists():
        for name in ("a.png", "b.png", "a/c.png"):
            put(root, name.split("/"), "picture")
        put(root, ["pipe"], "pipe")
        put(root, ["loop"], "loop")
    for old in [*root.glob("*.txt"), *root.glob("*.json")]:
        old.unlink()
    for name, data in files.items():
        (root / name).write_bytes(data)
    return load_folder(root, folder)


# --- npz data sets --------------------------------------------------------------------

_DTYPES = st.sampled_from(
    ["u1"] * 6 + ["i4", "i8", "u8", "f4", "f8", "?", "c8", "M8[s]", "U3", "S2", "O"]
)
_DIMS = st.lists(st.sampled_from([0, 1, 3, 4, 6, 6, 8]), max_size=5).map(tuple)
_ARRAYS = st.tuples(_DTYPES, _DIMS | st.just((6, 9, 9, 3)), st.integers(-2, 5))
_KEYS = st.sampled_from(
    "train_images train_labels val_images val_labels test_images test_labels images"
    " labels class_names other x/labels ../y".split()
)


def npz_of(arrays, compressed=False):
    out = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(out, **arrays)
    return out.getvalue()


def sound_set():
    """Six pictures of two classes."""
    images = np.random.default_rng(0).integers(0, 256, (6, 9, 9, 3), np.uint8)
    return {"images": images, "labels": np.arange(6) % 2}


def _set_file(arrays, labels, names, compressed):
    made = sound_set()
    made |= {} if labels is None else {"labels": labels}
    made |= {} if names is None else {"class_names": np.array(names)}
    for name, (dtype, shape, fill) in arrays.items():
        values = {"U": "abc"[: abs(fill)], "S": b"a", "O": {}, "M": 0}
        made[name] = np.full(shape, values.get(dtype[0], fill)).astype(dtype)
    return npz_of(made, compressed)


_ODD_LABELS = st.sampled_from([0, 1, 2, -1, 10**6, 2**31, 2**40])
SETS = damage(
    st.builds(
        _set_file,
        st.dictionaries(_KEYS, _ARRAYS, max_size=2),
        st.none()
        | st.lists(_ODD_LABELS, min_size=5, max_size=7).map(np.array)
        | st.sampled_from([np.nan, np.inf, 0.0]).map(lambda x: np.full(6, x)),
        st.none() | st.lists(st.text(max_size=3), max_size=3),
        st.booleans(),
    )
)


def try_set(data, folder):
    """`folder.load` of an npz file."""
    path = folder / "set.npz"
    path.write_bytes(data)
    return load_folder(path, folder)


def zip_with(name, header, payload, size):
    """An npz whose one array is described by `header` and has `size` bytes of zeros."""
    text = repr(header).encode() + b"\n"
    start = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            member.write(start + payload)
            for _ in range(size >> 20):
                member.write(bytes(1 << 20))
    return out.getvalue()


READERS: dict[str, Callable[[], Reader]] = {
    "config": lambda: Reader(edited("demo.py:smoke"), try_config),
    "benchmark": lambda: Reader(edited("vtab.py:task=svhn,smoke"), try_protocol),
    "flags": lambda: Reader(ARGUMENTS, try_flags),
    "prompts": lambda: Reader(PROMPT_FILES, try_prompts),
    "weights": lambda: Reader(_weights(), try_weights),
    "pictures": lambda: Reader(PICTURES, try_picture),
    "folders": lambda: Reader(TREES, try_folder),
    "lists": lambda: Reader(LISTS, try_lists),
    "npz sets": lambda: Reader(SETS, try_set),
}
