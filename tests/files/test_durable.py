# SPDX-License-Identifier: Apache-2.0
"""Disks that refuse, files that rot, signals, numbers that are none, odd data."""

import errno
import os
import signal
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command, start_command

import vpt_jax
from vpt_jax import train
from vpt_jax.bench import jobs
from vpt_jax.data import doubts, strips
from vpt_jax.data.tasks import Split
from vpt_jax.files import durable, preemption, states, workdirs
from vpt_jax.run import config as configs
from vpt_jax.run import fitting

TREE = {"a": np.arange(5000, dtype=np.float32), "n": np.zeros((), np.int32)}
pytestmark = pytest.mark.usefixtures("standard_promotion")

# --- what a disk may say --------------------------------------------------------------

REFUSALS = {
    errno.ENOSPC: "room on its disk",
    errno.EDQUOT: "raise the quota",
    errno.EROFS: "this user may write to",
    errno.ESTALE: "its disk to answer",
    errno.EIO: "check the disk or the network",
}


def write_prompts(path):
    model = vpt_jax.ViT(width=8, depth=1, num_heads=1, mlp_dim=8, patch=4, image_size=8)
    prompts = (jnp.ones((2, 8)),)
    vpt_jax.save_prompts(
        path,
        prompts,
        {"kernel": jnp.ones((8, 2)), "bias": jnp.ones(2)},
        model=model,
        backbone="hash",
        backbone_name="name",
        normalisation="half",
        class_names=("a", "b"),
    )


WRITERS = {
    "a checkpoint": lambda path: states.save_checkpoint(path, TREE),
    "a record": lambda path: workdirs.write_record(path, {"x": 1.5}),
    "a page": lambda path: workdirs.write_text(path, "text"),
    "prompts": write_prompts,
}


@pytest.mark.parametrize(
    ("number", "function"),
    [*((number, "replace") for number in REFUSALS), (errno.ENOSPC, "fsync")],
)
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_what_a_disk_refuses_names_the_file_and_leaves_the_last_good_one(
    tmp_path, monkeypatch, writer, number, function
):
    writer(tmp_path / "1")
    before = content(tmp_path)

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse)
        target = tmp_path / ("2" if writer is WRITERS["a checkpoint"] else "1")
        with pytest.raises(OSError) as error:
            writer(target)
    text = durable.explain(error.value)
    assert str(target) in text and os.strerror(number) in text
    assert REFUSALS[number] in text and "same command" in text
    after = {k: v for k, v in content(tmp_path).items() if ".partial" not in k}
    assert after == before
    writer(target)  # and all is well when the disk is


def content(folder):
    found = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.fixture
def small_disk(tmp_path):
    """1 MB of memory as a file system."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        made = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


# TensorStore reports writes still under way to a loop that Orbax has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_really_full(small_disk, capsys):
    directory = small_disk / "checkpoints"
    states.save_checkpoint(directory / "1", TREE)
    big = {"a": np.random.default_rng(0).normal(size=300_000), "n": TREE["n"]}
    for writer in (
        lambda: states.save_checkpoint(directory / "2", big),
        lambda: workdirs.write_text(small_disk / "page.html", "x" * 2_000_000),
    ):
        with pytest.raises(OSError) as error:
            writer()
        assert error.value.errno == errno.ENOSPC
        assert str(small_disk) in durable.explain(error.value)
    assert states.newest_checkpoint(directory) == (1, directory / "1")
    assert not (small_disk / "page.html").exists()
    states.save_checkpoint(directory / "2", TREE)  # what was left made room
    assert "Traceback" not in capsys.readouterr().err


def test_a_log_on_a_full_disk_says_so_and_does_not_wait(small_disk):
    log = workdirs.Log(small_disk / "log.txt", small_disk / "events", echo=False)
    (small_disk / "filler").write_bytes(b"x" * (1 << 20 - 1))
    with pytest.raises(OSError) as error:
        for _ in range(100_000):
            log.note("x" * 80)
            log.epoch("a", 1, 2, 3, {"loss": 1.0, "accuracy": 0.5, "seconds": 1.0})
    assert str(small_disk) in durable.explain(error.value)
    (small_disk / "filler").unlink()
    log.close()


def test_a_log_is_not_silent_for_long(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workdirs, "_REMINDS_AFTER_S", 0.1)
    log, said = workdirs.Log(tmp_path / "log.txt", tmp_path / "events"), ""
    log.progress("compiling")  # too early to be said
    while "still at work; the last word: compiling" not in said:
        said += capsys.readouterr().out
    log.close()


# --- files that rot -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "no checksums", "missing"])
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_used(tmp_path, how):
    older = {**TREE, "n": np.int32(7)}
    states.save_checkpoint(tmp_path / "1", older)
    states.save_checkpoint(tmp_path / "2", TREE)
    inside = [p for p in (tmp_path / "2").rglob("*") if p.is_file()]
    largest = max(inside, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    elif how == "no checksums":
        (tmp_path / "2" / states.CHECKSUMS).unlink()
    elif how == "missing":
        largest.unlink()
    else:
        largest.write_bytes(data[: len(data) // 2] if how == "cut" else b"")
    said = []
    number, got = states.restore_newest(tmp_path, TREE, said.append)
    assert number == 1 and got["n"] == 7
    np.testing.assert_array_equal(got["a"], TREE["a"])
    assert len(said) == 1 and f"{tmp_path / '2'} is damaged" in said[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2.damaged"]
    (tmp_path / "1" / states.CHECKSUMS).write_text("[")
    assert states.restore_newest(tmp_path, TREE, said.append) is None
    assert len(said) == 2


def test_every_flipped_bit_of_a_record_is_found(tmp_path):
    path = tmp_path / "a.json"
    value = {"row": {"test_accuracy": 0.8125, "score": None}, "seconds": 12.5}
    workdirs.write_record(path, value)
    assert workdirs.read_record(path) == value
    good = path.read_bytes()
    for at in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            path.write_bytes(bad)
            try:
                assert workdirs.read_record(path) == value  # white space
            except workdirs.Damaged as error:
                assert str(path) in str(error)


def test_records_that_are_none(tmp_path):
    for number, text in enumerate(["", "{", "[]", "null", "{}", '{"row": 1}']):
        path, said = tmp_path / f"{number}.json", []
        path.write_text(text)
        assert workdirs.sound_record(path, said.append) is None
        assert path.with_name(f"{path.name}.damaged").read_text() == text
        assert len(said) == 1 and not path.exists()


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / "kept").mkdir()
    for name in (".lock", ".job.lock", "a.json", ".a.json.k3_xyz90"):
        (tmp_path / name).touch()
    workdirs.remove_leftovers(tmp_path, tmp_path / "kept", tmp_path / "absent")
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".job.lock", ".lock", "a.json", "kept"]


def test_a_damaged_job_folder_is_moved_aside(tmp_path):
    partial, path = tmp_path / ".job", tmp_path / "job"
    for folder in (partial, path):
        folder.mkdir()
        (folder / jobs.RESULT).write_text(folder.name)
    jobs.publish(partial, path)
    assert (path / jobs.RESULT).read_text() == ".job"
    assert (tmp_path / "job.damaged" / jobs.RESULT).read_text() == "job"


# --- training: resume, signals, numbers -----------------------------------------------


@pytest.fixture(scope="module")
def problem():
    model = vpt_jax.ViT(
        width=8, depth=1, num_heads=2, mlp_dim=16, patch=4, image_size=8
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    noise = np.random.default_rng(1)

    def some(x):  # nothing to compile
        return jnp.asarray(0.2 * noise.normal(size=x.shape), jnp.float32)

    backbone = jax.tree.map(some, shapes["params"])
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (24, 8, 8, 3), np.uint8))
    labels = jnp.asarray(np.arange(24) % 3, jnp.int32)
    trainable = {
        "prompts": (some(np.zeros((2, 8))),),
        "head": {"kernel": some(np.zeros((8, 3))), "bias": some(np.zeros(3))},
    }
    return model, backbone, images, labels, trainable


class Spy(workdirs.Log):
    """A log that keeps what it is told and calls `hook` after each epoch."""

    def __init__(self, hook=lambda epoch: None):
        self.lines, self.epochs, self.hook = [], [], hook

    def line(self, text):
        self.lines.append(text)

    def note(self, text):
        pass

    def progress(self, text):
        pass

    def epoch(self, name, epoch, epochs, images, metrics, prefix=""):
        self.epochs.append((epoch, metrics["loss"], metrics["accuracy"]))
        self.hook(epoch)


def settings(**changes):
    values = {"epochs": 4, "warmup_epochs": 0.0, "base_lr": 0.5, "weight_decay": 1e-3}
    return configs.TrainConfig(**{**values, "batch_size": 2, **changes})


def fit(problem, directory, log, **changes):
    model, backbone, images, labels, trainable = problem
    diverged = changes.pop("diverged", "error")
    job = fitting.Fit(
        name="unit",
        prefix="",
        config_key="config.tune.base_lr",
        settings=settings(**changes),
        recipe=train.Recipe(optimizer=changes.get("optimizer", "sgd"), dropout=0.5),
        seed=3,
        directory=directory,
        checkpoint_every=2,
        diverged=diverged,
    )
    start = jax.tree.map(jnp.array, trainable)
    return fitting.fit(job, start, backbone, images, labels, log, model=model)


@pytest.fixture(scope="module")
def undisturbed(problem, tmp_path_factory):
    log = Spy()
    return fit(problem, tmp_path_factory.mktemp("fit"), log), log.epochs


def test_epochs_are_made_of_calls_of_few_lengths():
    assert fitting.call_lengths(13) == [1] * 13  # one compilation, not two
    assert fitting.call_lengths(25) == [5] * 5
    assert fitting.call_lengths(16) == [4] * 4
    assert fitting.call_lengths(3) == [3]
    assert fitting.call_lengths(25, on_features=True) == [25]
    assert sum(fitting.call_lengths(1009)) == 1009


@pytest.mark.parametrize("calls", [1, 5])
def test_sigterm_within_an_epoch_saves_and_continues_bit_for_bit(
    undisturbed, problem, tmp_path, monkeypatch, calls
):
    """12 steps are three calls: SIGTERM comes in every `calls`-th one."""
    (expected, _), epochs = undisturbed
    train_epoch, seen, requested = train.train_epoch, [0], threading.Event()
    monkeypatch.setattr(preemption, "_requested", requested)

    def call(*args, **kwargs):
        seen[0] += 1
        if seen[0] % calls == 0:
            requested.set()
        return train_epoch(*args, **kwargs)

    monkeypatch.setattr(train, "train_epoch", call)
    log, stops = Spy(), 0
    while True:
        requested.clear()
        try:
            got, _ = fit(problem, tmp_path, log)
            break
        except preemption.Preempted:
            stops += 1
            newest, _ = states.newest_checkpoint(tmp_path)
            assert f"saved after step {newest}" in log.lines[-1]
    assert stops == 12 // calls
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert log.epochs == epochs
    assert seen[0] == 12  # nothing was computed twice


def test_a_kill_loses_the_interval_and_a_flipped_bit_one_more(
    undisturbed, problem, tmp_path
):
    (expected, _), _ = undisturbed

    def kill(epoch):
        if epoch == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(problem, tmp_path, Spy(kill))
    number, path = states.newest_checkpoint(tmp_path)
    assert number == 24  # after epoch 2
    (path / states.CHECKSUMS).write_text("{}")
    log = Spy()
    got, training = fit(problem, tmp_path, log)
    assert "is damaged" in log.lines[0] and training["epochs"] == 4
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_number_that_is_none_stops_with_step_rate_and_checkpoint(
    problem, tmp_path, monkeypatch
):
    model, backbone, images, labels, trainable = problem
    learning_rates = train.learning_rates

    def spoilt(*args, **kwargs):
        rates = learning_rates(*args, **kwargs)
        rates[2, 7] = np.inf
        return rates

    monkeypatch.setattr(train, "learning_rates", spoilt)
    with pytest.raises(FloatingPointError) as error:
        fit(problem, tmp_path / "a", Spy())
    text = str(error.value)
    # The update of that step is the first that is not finite.
    assert "step 32 (epoch 3, step 8 of 12) at learning rate inf" in text or (
        "step 33 (epoch 3, step 9 of 12)" in text
    )
    assert f"last good checkpoint is {tmp_path / 'a' / '24'}, after step 24" in text
    assert "lower config.tune.base_lr (0.5)" in text
    log = Spy()
    kept, training = fit(problem, tmp_path / "b", log, diverged="last_finite")
    assert training["epochs"] == 2 and "ended with epoch 2" in log.lines[-1]
    again, _ = fit(problem, tmp_path / "b", Spy(), diverged="last_finite")
    jax.tree.map(np.testing.assert_array_equal, kept, again)


# --- the real command -----------------------------------------------------------------


def test_a_second_command_on_a_workdir_refuses_and_sigterm_ends_with_75(tmp_path):
    args = ("--config=configs/demo.py:digits,smoke", f"--workdir={tmp_path}/out")
    first = start_command(*args)
    log = tmp_path / "out" / "log.txt"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    second = command(*args)
    assert second.returncode == 2
    assert "another process works on" in second.stderr
    assert "Traceback" not in second.stderr
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 75 and "the same command continues" in err
    assert "Traceback" not in err


SIGNALLED = """
import os, signal, sys, time
from vpt_jax.files import preemption
preemption.watch()
try:
    with preemption.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        print(preemption.requested(), flush=True)
        if sys.argv[1:]:
            time.sleep(1.5)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        os.kill(os.getpid(), signal.SIGTERM)  # one that says the same
except preemption.Preempted:
    sys.exit(preemption.EXIT_CODE)
"""


@pytest.mark.parametrize(("args", "code"), [((), 75), (("twice",), 143)])
def test_sigterm_is_held_back_and_a_second_one_is_not(args, code):
    done = command(*args, python=("-c", SIGNALLED))
    assert (done.returncode, done.stdout) == (code, "True\n"), done.stderr


# --- data -----------------------------------------------------------------------------


def splits_of(train, val=None, test=None):
    def split(images):
        return images, np.arange(len(images), dtype=np.int32) % 2

    parts = {"train": train, "val": val, "test": test}
    return {k: None if x is None else split(x) for k, x in parts.items()}


def noise(num, seed):
    return np.random.default_rng(seed).integers(0, 256, (num, 6, 6, 3), np.uint8)


def test_pictures_in_two_splits_and_constant_ones_are_told():
    train, val, test = noise(9, 0), noise(70, 1), noise(140, 2)
    assert doubts.doubts(splits_of(train, val, test)) == []
    assert doubts.doubts(splits_of(train)) == []
    val[66], test[129], test[130] = train[4], train[5], val[3]
    val[2], test[:2] = 7, 9
    found = doubts.doubts(splits_of(train, val, test))
    better = "with another label, which makes results look better than they are"
    assert found == [
        "1 of 70 val pictures are of one colour; the first is val number 2 (label 0)",
        f"1 of 70 val pictures are also in train, 0 {better}: val number 66 ="
        " train number 4",
        "2 of 140 test pictures are of one colour; the first is test number 0 (label"
        " 0)",
        f"1 of 140 test pictures are also in train, 0 {better}: test number 129 ="
        " train number 5",
        f"1 of 140 test pictures are also in val, 1 {better}: test number 130 = val"
        " number 3",
    ]


def test_of_strips_the_centres_are_compared():
    pixels = noise(1, 0)[0].repeat(100, 0)[:256, :1].repeat(256, 1)
    strip = strips.make(pixels, [256], [True])
    strip = jax.tree.map(jnp.asarray, strip)
    centre = np.asarray(strips.view(strip, jnp.arange(1)))
    train, test = (Split(x, np.full(1, k)) for k, x in enumerate((strip, centre)))
    found = doubts.doubts({"train": train, "val": None, "test": test})
    assert [text for text in found if "also in train, 1 with another label" in text]
