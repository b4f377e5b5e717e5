"""The plane of an index follows its vectors, is no state, and changes no result."""

import copy
import io
import pickle
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from elips_torch import ArgumentError, FlatIndex, IndexFileError, IVFFlatIndex, load_index
from elips_torch.core.hardware import DeviceFacts
from elips_torch.indexes.screening_plane import ScreeningPlane
from elips_torch.kernels.knn_native import NativeSearch
from elips_torch.kernels.knn_screened import ScreenedSearch
from elips_torch.kernels.plane import NORM, RESIDUAL
from elips_torch.kernels.prepared_native import PreparedSearch
from elips_torch.testing.contract import assert_same

DIM = 16
METRICS = ["l2", "ip", "cosine"]


@pytest.fixture(autouse=True)
def _small_problems_take_every_step(monkeypatch):
    monkeypatch.setattr("elips_torch.kernels.exact_tile._FEW_FEATURES", 0)


def random(n, dim=DIM, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def make(n=800, metric="l2", screen="int8", **options):
    index = FlatIndex(DIM, metric, k=3, screen=screen, **options)
    index.add(random(n).to(index.dtype))
    return index


def assert_follows(index):
    """The plane bounds the vectors as they are, and searches are those without it."""
    vectors = index.vectors.detach()
    plane = index.plane.current(index.vectors)
    assert plane is not None
    assert plane.codes.shape == vectors.shape
    assert plane.terms.shape == (len(vectors), 4)
    wide = vectors.double()
    if index.metric == "cosine":
        wide = torch.nn.functional.normalize(wide, eps=1e-300)
    centred = wide - plane.mean.double()
    assert bool((plane.terms[:, NORM] >= torch.linalg.vector_norm(centred, dim=1)).all())
    lost = torch.linalg.vector_norm(centred - plane.terms[:, :1].double() * plane.codes.double(), dim=1)
    assert bool((plane.terms[:, RESIDUAL] >= lost).all())
    queries = random(5, seed=9)
    other = FlatIndex(DIM, index.metric, k=3, screen="none", dtype=index.dtype)
    other.add(vectors, ids=index.ids)
    found, expected = index(queries), other(queries)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.ids, expected.ids)


def pickled(index):
    return pickle.loads(pickle.dumps(index))


def saved(index):
    buffer = io.BytesIO()
    torch.save(index, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def loaded(index):
    other = FlatIndex(DIM, index.metric, k=3, screen=index.screen, dtype=index.dtype)
    other.add(random(7, seed=3))
    other.load_state_dict(index.state_dict())
    return other


def assigned(index):
    other = FlatIndex(DIM, index.metric, k=3, screen=index.screen)
    other.load_state_dict(copy.deepcopy(index.state_dict()), assign=True)
    return other


def through_a_file(index, tmp_path):
    index.save(tmp_path / "index")
    return load_index(tmp_path / "index")


def overwritten(index):
    with torch.no_grad():
        index.vectors[::7] += 3.0
    # Changes that come before a search are the next test's.
    index(random(1))
    return index


def test_follows_any_sequence_of_changes(tmp_path):
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        metric, screen = METRICS[seed % 3], ("int8", "bf16")[seed // 3]

        def draw(n, generator=generator):
            return int(torch.randint(0, n, (), generator=generator))

        index = make(600 if seed % 2 else 0, metric, screen)
        for step in range(14):
            rows = random(draw(200) + 100, seed=1000 * seed + step) * 10.0 ** (draw(5) - 2) + draw(3)
            if len(index) < 400:
                index.add(torch.cat([rows, rows[:50]]))
            match draw(12):
                case 0:
                    index.add(rows.round() if draw(2) else rows)
                case 1:
                    index.upsert(rows[:60], index.ids[torch.randperm(len(index), generator=generator)[:60]])
                case 2:
                    index.remove(index.ids[torch.randperm(len(index), generator=generator)[:90]])
                case 3:
                    index.reset()
                    index.add(rows)
                case 4:
                    index = (loaded, assigned)[draw(2)](index)
                case 5:
                    index = through_a_file(index, tmp_path)
                case 6:
                    index = (index.half, index.bfloat16)[draw(2)]().float()
                case 7:
                    index = index.double().float()
                case 8:
                    index = (copy.deepcopy, copy.copy, pickled, saved)[draw(4)](index)
                case 9:
                    index.share_memory()
                case 10:
                    index = overwritten(index)
                case _:
                    with torch.inference_mode():
                        index.add(rows)
            assert_follows(index)


@pytest.mark.parametrize("screen", ["int8", "bf16"])
@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_follows_a_change_of_dtype(dtype, screen):
    index = getattr(make(screen=screen), dtype)()
    assert index.plane.kind == screen
    assert index.plane.terms.dtype == torch.float32
    assert_follows(index)
    index.add(random(100, seed=4))
    assert_follows(index)


def test_codes_stay_small():
    index = make(screen="bf16").float()
    index.plane.current(index.vectors)
    assert index.plane.codes.dtype == torch.bfloat16


def test_float64_vectors_are_not_screened():
    index = make().double()
    index.reset()
    # Their differences are below the resolution of float32.
    index.add(3 * random(800).double() + 3e7)
    assert index.plane.current(index.vectors) is None
    queries = 3 * random(5, seed=9).double() + 3e7
    other = FlatIndex(DIM, dtype=torch.float64, k=3)
    other.add(index.vectors, ids=index.ids)
    assert torch.equal(index(queries).ids, other(queries).ids)
    index.float()
    assert_follows(index)


CHANGES = {
    "add": lambda index: index.add(random(5, seed=5)),
    "upsert": lambda index: index.upsert(random(1, seed=5), torch.tensor([3])),
    "remove": lambda index: index.remove(torch.tensor([3])),
    "float": lambda index: index.float(),
    "share": lambda index: index.share_memory(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_write_before_another_change_is_seen(change):
    index = make()
    with torch.no_grad():
        index.vectors[:300] = random(1, seed=9) + 0.1 * random(300, seed=6)
    CHANGES[change](index)
    assert_follows(index)


def test_vectors_that_are_replaced_twice_are_seen():
    index = make()
    for seed in range(20):
        index.vectors = random(800, seed=2 * seed)
        index.vectors = random(800, seed=2 * seed + 1)
        assert_follows(index)


@pytest.mark.parametrize("write", ["index_copy", "inference", "copy", "fill", "through a view"])
def test_writes_into_the_vectors_are_seen(write):
    index = make()
    assert_follows(index)
    near = random(1, seed=9) + 0.1 * random(800, seed=6)
    with torch.inference_mode() if write == "inference" else torch.no_grad():
        if write == "index_copy":
            index.vectors.index_copy_(0, torch.arange(300), near[:300])
        elif write == "fill":
            index.vectors[:300] = near[0]
        elif write == "through a view":
            index.vectors[:300].mul_(1e-3)
        else:
            index.vectors.copy_(near)
    assert_follows(index)


FUSED = {"fused": True}


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, FUSED], ids=str)
def test_a_learnable_database_is_followed_through_training(name, options):
    index = make(learnable=True)
    optimiser = getattr(torch.optim, name)(index.parameters(), lr=0.5, **options)
    for step in range(3):
        before = index.plane.current(index.vectors).codes.clone()
        optimiser.zero_grad()
        index(random(50, seed=step)).scores.sum().backward()
        optimiser.step()
        assert_follows(index)
        assert index.plane.kind == "int8"
        assert not torch.equal(index.plane.codes, before)


def test_a_learnable_database_keeps_no_plane_by_itself():
    index = make(screen="auto", learnable=True)
    assert index.plane.kind == "none"
    assert index.plane.current(index.vectors) is None


# The mean.


def test_the_mean_moves_when_the_database_has_doubled_and_drifted():
    index = make(200)
    mean = index.plane.mean.clone()
    index.add(random(150, seed=1) + 50.0)
    assert torch.equal(index.plane.mean, mean)
    index.add(random(100, seed=2) + 50.0)
    # Rows of small batches wait for the next search.
    index.plane.current(index.vectors)
    torch.testing.assert_close(index.plane.mean, index.vectors.mean(0))
    assert_follows(index)


def test_the_mean_stays_where_nothing_drifts():
    index = make(200)
    mean = index.plane.mean.clone()
    for seed in range(1, 8):
        index.add(random(300, seed=seed))
    assert torch.equal(index.plane.mean, mean)
    assert_follows(index)


def test_integers_stay_integers_until_other_values_come():
    index = FlatIndex(DIM, k=3, screen="int8")
    index.add((random(600) * 20).round().clamp(-128, 127))
    index.add(torch.full((1, DIM), 127.0))
    assert index.plane.is_integer
    index.add(torch.empty(0, DIM))
    index.upsert(torch.zeros(1, DIM), torch.tensor([3]))
    assert index.plane.is_integer
    assert_follows(index)
    index.add(torch.full((1, DIM), 0.5))
    index.plane.current(index.vectors)
    assert not index.plane.is_integer
    assert_follows(index)
    index = FlatIndex(DIM, k=3, screen="int8")
    index.add((random(600) * 20).round().clamp(-128, 127))
    index.upsert(torch.full((1, DIM), 128.0), torch.tensor([3]))
    assert_follows(index)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0**61])
def test_without_bounds_there_is_no_plane(bad):
    for change in ("add", "upsert"):
        index = make(check_finite=False)
        row = random(1, seed=4)
        row[0, 3] = bad
        if change == "add":
            index.add(row)
        else:
            index.upsert(row, torch.tensor([3]))
        assert index.plane.current(index.vectors) is None
        other = FlatIndex(DIM, k=3, screen="none", check_finite=False)
        other.add(index.vectors)
        assert torch.equal(index(random(5, seed=9)).ids, other(random(5, seed=9)).ids)


# The plane is no state.


def test_no_checkpoint_and_no_file_holds_the_plane(tmp_path):
    index, plain = make(), make(screen="none")
    assert sorted(index.state_dict()) == sorted(plain.state_dict()) == ["ids", "next_id", "vectors"]
    assert [name for name, _ in index.named_parameters()] == []
    index.save(tmp_path / "screened")
    plain.save(tmp_path / "plain")
    assert sorted(load_file(tmp_path / "screened")) == ["ids", "next_id", "vectors"]
    sizes = [(tmp_path / name).stat().st_size for name in ("screened", "plain")]
    assert abs(sizes[0] - sizes[1]) < 64


@pytest.mark.parametrize("screens", [("int8", "none"), ("none", "bf16"), ("bf16", "int8")])
def test_the_settings_decide_which_plane_a_file_or_checkpoint_gets(screens, tmp_path):
    wrote, reads = screens
    index, other = make(screen=wrote), FlatIndex(DIM, k=3, screen=reads)
    other.load_state_dict(index.state_dict())
    assert other.plane.kind == reads
    queries = random(5, seed=9)
    assert torch.equal(index(queries).ids, other(queries).ids)
    index.save(tmp_path / "index")
    with safe_open(tmp_path / "index", "pt") as file:
        header = file.metadata()
    again = load_index(tmp_path / "index")
    assert again.plane.kind == wrote
    changed = header["config"].replace(f'"screen": "{wrote}"', f'"screen": "{reads}"')
    assert changed != header["config"]
    save_file(load_file(tmp_path / "index"), tmp_path / "index", metadata={**header, "config": changed})
    again = load_index(tmp_path / "index")
    assert again.plane.kind == reads
    assert torch.equal(again(queries).ids, index(queries).ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plane.codes": torch.zeros(800, DIM, dtype=torch.int8)}, "plane.codes"),
        ({"plane.terms": torch.zeros(800, 4)}, "plane.terms"),
        ({"vectors": torch.zeros(800, DIM + 1)}, "vectors"),
        ({"vectors": torch.zeros(700, DIM)}, "differ in length"),
    ],
    ids=["codes", "terms", "width", "length"],
)
def test_a_file_with_other_tensors_is_refused(change, message, tmp_path):
    make().save(tmp_path / "index")
    with safe_open(tmp_path / "index", "pt") as file:
        header = file.metadata()
    save_file({**load_file(tmp_path / "index"), **change}, tmp_path / "index", metadata=header)
    with pytest.raises(IndexFileError, match=message):
        load_index(tmp_path / "index")


def test_a_refused_checkpoint_leaves_the_plane_right():
    index = make()
    bad = {**index.state_dict(), "vectors": torch.zeros(800, DIM + 1)}
    with pytest.raises(RuntimeError, match="vectors"):
        index.load_state_dict(bad)
    assert_follows(index)


# Choice.


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ({"dim": 8, "screen": "int4"}, ["int4", "'auto'", "'int8'", "'bf16'", "'none'"]),
        ({"dim": 8, "screen": None}, ["None"]),
        ({"dim": 8, "screen": "int8", "metric": "l1"}, ["l1", "'l2', 'ip' and 'cosine'"]),
        ({"dim": 8, "screen": "bf16", "metric": "linf"}, ["linf"]),
        ({"dim": 8, "screen": "int8", "dtype": torch.float64}, ["float64"]),
        ({"dim": 131_072, "screen": "int8"}, ["131072", "131071"]),
        (
            {"dim": 131_072, "screen": "int8", "metric": "l1", "dtype": torch.float64},
            ["l1", "float64", "131072"],
        ),
    ],
)
def test_a_screen_that_cannot_serve_is_refused_with_every_reason(arguments, messages):
    with pytest.raises(ArgumentError) as caught:
        FlatIndex(**arguments)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize("arguments", [{"metric": "l1"}, {"dtype": torch.float64}, {"dim": 131_072}])
def test_auto_keeps_no_plane_where_none_can_serve(arguments):
    index = FlatIndex(**{"dim": 8} | arguments)
    index.add(torch.rand(3, index.dim, dtype=index.dtype))
    assert index.plane.kind == "none"


def test_the_largest_size_of_an_int8_plane():
    assert FlatIndex(131_071, screen="int8").screen == "int8"
    assert FlatIndex(131_072, screen="bf16").screen == "bf16"


# Torch's own switch warns where it has no support of Intel's GPUs.
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
@pytest.mark.parametrize("missing", ["instructions", "library", "right results"])
@pytest.mark.parametrize("metric", METRICS)
def test_without_fast_int8_products(metric, missing, monkeypatch):
    """Auto keeps nothing; a plane that was asked for gives the same results."""

    def check():
        assert make(metric=metric, screen="auto").plane.kind == "fp32"
        index = make(metric=metric)
        assert index.plane.kind == "int8"
        assert_follows(index)
        assert ran

    ran = []
    for search in (ScreenedSearch, NativeSearch, PreparedSearch):
        run = search.run
        monkeypatch.setattr(search, "run", lambda self, *args, run=run: ran.append(1) or run(self, *args))
    if missing == "library":
        with torch.backends.mkldnn.flags(enabled=False):
            check()
        return
    if missing == "instructions":
        facts = DeviceFacts("cpu", "2 cores", "AVX2")
        monkeypatch.setattr("elips_torch.core.hardware.device_facts", lambda device: facts)
    else:
        monkeypatch.setattr("elips_torch.core.hardware._int8_product_is_right", lambda: False)
    check()


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(default):
    expected = make()(random(5, seed=9))
    torch.set_default_dtype(default)
    try:
        index = FlatIndex(DIM, k=3, screen="int8", dtype=torch.float32)
        index.add(random(800))
        found = index(random(5, seed=9))
        assert index.plane.terms.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)


# Rows of small batches wait.


def waiting(kind="float", listed=False, metric="l2"):
    """Return an index whose last rows wait, and vectors like these: further away, no integers, too long."""
    index = IVFFlatIndex(DIM, 3, metric, nprobe=3, niter=2, screen="int8") if listed else None
    index = index or FlatIndex(DIM, metric, screen="int8")
    rows = (random(600) * 20).round() if kind == "integers" else random(600)
    index.fit(rows)
    index.add(rows)
    index.search(rows[:2], 3)
    new = {
        "float": random(40, seed=3) + 5,
        "integers": random(40, seed=3) * 20,
        "long": random(40, seed=3) * 1e19,
    }[kind]
    for some in new.split(5):
        index.add(some)
    assert index.plane._n_waiting == 40
    return index, new


@pytest.mark.parametrize("kind", ["float", "integers", "long"])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("change", ["nothing", "upsert", "upsert waiting", "remove", "copy", "double"])
def test_rows_that_wait_are_found(kind, listed, metric, change):
    index, new = waiting(kind, listed, metric)
    if change == "upsert":
        index.upsert(random(3, seed=4), torch.tensor([1, 2, 900]))
    elif change == "upsert waiting":
        index.upsert(random(3, seed=4), torch.tensor([1, 605, 630]))
    elif change == "remove":
        index.remove(index.ids[::7])
    elif change == "copy":
        index = copy.deepcopy(index)
    elif change == "double":
        # As many again: the mean is looked at.
        index.add(random(700, seed=6) + 9)
    for _ in range(2):
        for queries in (new, random(5, seed=5)):
            assert_same(index.search(queries, 4), index.search(queries, 4, implementation="eager"))


def test_a_thread_waits_for_another_that_encodes(monkeypatch):
    index, new = waiting()
    index.add(random(700, seed=6) + 40)
    index.add(random(5, seed=7) + 40)
    reached, go_on, found = threading.Event(), threading.Event(), []
    unhurt = ScreeningPlane._encoded

    def slow(plane, rows):
        reached.set()
        go_on.wait(20)
        return unhurt(plane, rows)

    monkeypatch.setattr(ScreeningPlane, "_encoded", slow)
    threads = [threading.Thread(target=lambda: found.append(index.search(new, 4))) for _ in range(2)]
    threads[0].start()
    assert reached.wait(20)
    threads[1].start()
    threads[1].join(0.2)
    assert not found
    go_on.set()
    for thread in threads:
        thread.join()
    for each in found:
        assert_same(each, index.search(new, 4, implementation="eager"))
