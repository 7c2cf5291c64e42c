"""The counterfactual against loops of PyTorch's own operators, and its counts against plain NumPy."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import xarray as xr

torch = pytest.importorskip("torch")

import ledgers  # noqa: E402
import runs  # noqa: E402  (needs torch)

import jaxaudit  # noqa: E402
from jaxaudit import auditing, strips, workbench  # noqa: E402
from jaxaudit.arithmetics import CATALOGUE, Options  # noqa: E402
from jaxaudit.devices import find_device  # noqa: E402
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, decode, round_to  # noqa: E402
from jaxaudit.ledger import counterfactual, courses, stepping  # noqa: E402
from jaxaudit.ledger.counterfactual import Counterfactual  # noqa: E402
from jaxaudit.ledger.ranges import ORDINARY, Envelope, Range, RangeOperations  # noqa: E402
from jaxaudit.ledger.remedies import BASES  # noqa: E402
from jaxaudit.ledger.stepping import Stepper  # noqa: E402
from jaxaudit.ledger.subject import Subject  # noqa: E402
from jaxaudit.ledger.variables import COUNTERFACTUAL  # noqa: E402
from jaxaudit.operations import NumpyOperations  # noqa: E402
from jaxaudit.recorders.pytorch import probe_sqrt  # noqa: E402
from jaxaudit.recording import TokenGroups  # noqa: E402

STEPS, ROWS, WIDTH = 7, 12, 5
DTYPES = {BFLOAT16: torch.bfloat16, FLOAT16: torch.float16, FLOAT32: torch.float32}
REMEDIES = ["recorded", "float32-moments", "float32-master", "stochastic-rounding", "stochastic-rounding-expected", "kahan", "beta2-0.95", "beta2-0.8"]  # fmt: skip
BETAS = (0.95, 0.8)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    runs.torch_runs.root()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def metadata():
    return {"sqrt_probe": json.dumps(probe_sqrt(torch.device("cpu")))}


def groups_of(rows=ROWS):
    """Overlapping ones, one of few tokens at the end, so that row ranges have none of it."""
    members = {"all": np.arange(rows), "some": np.arange(0, rows, 2), "last": np.arange(rows - 2, rows)}  # fmt: skip
    return TokenGroups(rows, members)


def lost_of(seen):
    """Every third element and step, whatever happened: what is lost is another part's to tell."""
    length, elements = np.shape(seen.arrays["grad"])
    width = elements // (seen.window.rows[1] - seen.window.rows[0])
    index = np.arange(elements) + seen.window.rows[0] * width
    steps = seen.window.first + np.arange(length)
    return ((index + steps[:, None]) % 3 == 0).astype(np.uint8)


def counterfactual_of(path, *, beta2=BETAS, seed=0, **how):
    """Return the dataset, and the weights of each remedy after the last step."""
    made = []

    def observers(subject):
        assert Counterfactual.possible(subject)
        made.append(Counterfactual(subject, beta2=beta2, seed=seed))
        return [lambda seen: made[0].take(seen, jax.device_put(lost_of(seen)))]

    ledgers.observe(path, observers, **how)
    found = made[0].dataset()
    return found, {str(name): made[0].final_weights(str(name)) for name in found.remedy.values}


def save(folder, run, rows, width, **how):
    """Write a run as a recording of rows."""
    shape = (run.setting.steps + 1, rows, width)
    change = {k: x.reshape(shape) for k, x in runs.prove.arrays_of(run).items() if k.endswith("W")}
    return runs.save(folder / "run.safetensors", run, change=change, metadata=metadata(), **how)


# Torch, operator by operator.


def tensor(values, dtype):
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(dtype)


class Loop:
    """`_single_tensor_adam` on tensors whose formats are chosen one by one."""

    def __init__(self, given, options, storage, moments=None, beta2=None, corrected=None):
        self.given, self.options, self.storage = given, options, storage
        self.moments = moments or storage
        self.beta2 = given.beta2 if beta2 is None else beta2

    def new_moments(self, t, g, state, p):
        """Return the moments after step t, from those before it, the gradient and the weight."""
        given, options = self.given, self.options
        g = -g if options.maximize else g
        if given.weight_decay and not options.decoupled:
            g = g.add(p, alpha=given.weight_decay) if p.dtype == g.dtype else self.coupled(g, p)
        m, v = state["exp_avg"].to(self.moments), state["exp_avg_sq"].to(self.moments)
        g = g.to(self.moments)
        m = m.lerp(g, 1 - given.beta1)
        v = v.mul(self.beta2).addcmul(g, g, value=1 - self.beta2)
        found = {"exp_avg": m, "exp_avg_sq": v}
        if options.amsgrad:
            most = state["max_exp_avg_sq"].to(self.moments)
            found["max_exp_avg_sq"] = torch.maximum(most, v)
        return found

    def coupled(self, g, p):
        """Add L2 decay of a float32 weight to a 16-bit gradient as `add` does that of a 16-bit one."""
        decay = tensor([self.given.weight_decay], g.dtype).double()
        once = (decay * p.double() + g.double()).float().to(g.dtype)  # no tie is met here
        twice = ((decay.float() * p).to(g.dtype).float() + g.float()).to(g.dtype)
        scalar = torch.arange(p.numel()) >= p.numel() - p.numel() % 32
        return torch.where(scalar, twice, once)

    def step_size(self, t):
        return -(self.given.learning_rate[t - 1] / (1 - self.given.beta1**t))

    def denominator(self, t, moments, dtype):
        second = moments["max_exp_avg_sq" if self.options.amsgrad else "exp_avg_sq"].to(dtype)
        return (second.sqrt() / (1 - self.beta2**t) ** 0.5).add(self.given.epsilon)

    def decayed(self, t, p):
        given = self.given
        if given.weight_decay and self.options.decoupled:
            return p.mul(1 - given.learning_rate[t - 1] * given.weight_decay)
        return p

    def new_weight(self, t, moments, p, dtype=None):
        """Return the weight after step t; the denominator and the sum are of a format."""
        dtype = dtype or self.moments
        d, p = self.denominator(t, moments, dtype), self.decayed(t, p)
        m = moments["exp_avg"].to(dtype)
        if p.dtype == dtype:
            return p.addcdiv(m, d, value=self.step_size(t))
        return p.to(dtype).addcdiv(m, d, value=self.step_size(t)).to(p.dtype)

    def kahan(self, t, moments, p, c):
        """`AnyPrecisionAdamW` with the scalars of torch's Adam."""
        p = self.decayed(t, p)
        d = self.denominator(t, moments, self.storage)
        c = c.addcdiv(moments["exp_avg"].to(self.storage), d, value=self.step_size(t))
        new = p.add(c)
        return new, c.add(p.sub(new))


def values_of(run, key):
    return decode(run.patterns[key], run.formats[key])


def by_torch(run, seed=0, start=1, stop=None):
    """Take every remedy's steps with torch; (T, n) float32 values of the weights one step ahead and left to itself.

    With the expectation of chance, those are before they are rounded.
    """
    given, options = run.setting.hyperparameters, run.setting.options
    dtype = DTYPES[run.setting.storage]
    stop = stop or run.setting.steps + 1
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if options.amsgrad else [])]
    usual, wide = Loop(given, options, dtype), Loop(given, options, torch.float32)
    mixed = Loop(given, options, dtype, moments=torch.float32)
    others = {f"beta2-{b:g}": Loop(given, options, dtype, beta2=b) for b in BETAS}
    recorded = [
        {name: tensor(values_of(run, name)[t], torch.float32) for name in names} | {"param": tensor(values_of(run, "param")[t], dtype)}
        for t in range(run.setting.steps + 1)
    ]  # fmt: skip
    first = recorded[start - 1]
    p, moments = first["param"], {name: first[name] for name in names}
    sixteen = dtype != torch.float32
    free = {name: p for name in REMEDIES if name != "recorded"}
    free["float32-master"] = free["stochastic-rounding-expected"] = p.float()
    own = dict.fromkeys(free, moments)
    along = dict.fromkeys(("float32-moments", *others), moments)
    compensation = torch.zeros_like(p)
    ahead_of, free_of = {name: [] for name in free}, {name: [] for name in free}
    for t in range(start, stop):
        g, w, now = (
            tensor(values_of(run, "grad")[t - 1], dtype),
            recorded[t - 1]["param"],
            recorded[t - 1],
        )
        bits = random16(seed, t, p.numel())

        def chance(x, bits=bits):
            pattern = x.numpy().view(np.uint32) + bits
            rounded = tensor((pattern & np.uint32(0xFFFF0000)).view(np.float32), dtype)
            return torch.where(x.isnan(), x.to(dtype), rounded)

        ahead, own_new = {}, {}
        for name, loop in {"float32-moments": mixed, **others}.items():
            along[name] = loop.new_moments(t, g, along[name], w)
            ahead[name] = loop.new_weight(t, along[name], w)
            own_new[name] = loop.new_moments(t, g, own[name], free[name])
            free[name] = loop.new_weight(t, own_new[name], free[name])
        if sixteen:
            ahead["float32-master"] = wide.new_weight(
                t, wide.new_moments(t, g.float(), now, w.float()), w.float()
            )
            own_new["float32-master"] = wide.new_moments(
                t, g.float(), own["float32-master"], free["float32-master"]
            )
            free["float32-master"] = wide.new_weight(
                t, own_new["float32-master"], free["float32-master"]
            )
            kept = usual.new_moments(t, g, now, w)
            drawn = wide.new_weight(t, kept, w.float())
            ahead["stochastic-rounding"], ahead["stochastic-rounding-expected"] = (
                chance(drawn),
                drawn,
            )
            ahead["kahan"] = usual.kahan(t, kept, w, torch.zeros_like(w))[0]
            for name in ("stochastic-rounding", "stochastic-rounding-expected", "kahan"):
                own_new[name] = usual.new_moments(t, g, own[name], free[name])
            x = wide.new_weight(
                t, own_new["stochastic-rounding"], free["stochastic-rounding"].float()
            )
            free["stochastic-rounding"] = chance(x)
            name = "stochastic-rounding-expected"
            free[name] = wide.new_weight(t, own_new[name], free[name])
            free["kahan"], compensation = usual.kahan(
                t, own_new["kahan"], free["kahan"], compensation
            )
        own = own_new
        for name in ahead:
            ahead_of[name].append(ahead[name].float().numpy())
            free_of[name].append(free[name].float().numpy())
    pack = lambda each: {name: np.stack(v) for name, v in each.items() if v}  # noqa: E731
    return pack(ahead_of), pack(free_of)


def random16(seed, timestep, count, first=0):
    """Draw 16 bits for each element, in Python's integers."""
    key = [int(x) for x in np.random.SeedSequence((seed, timestep)).generate_state(2, np.uint32)]
    mask = 0xFFFFFFFF

    def scrambled(x):
        x = ((x ^ x >> 16) * 0x21F0AAAD) & mask
        x = ((x ^ x >> 15) * 0xD35A2D97) & mask
        return x ^ x >> 15

    found = []
    for k in range(first, first + count):
        mixed = (scrambled((k & mask) ^ key[0]) + (k >> 32) * 0x9E3779B9) & mask
        found.append(scrambled(mixed ^ key[1]) >> 16)
    return np.array(found, np.uint32)


# The definitions, in NumPy.


def changed(a, b):
    return (a != b) & ~(np.isnan(a) & np.isnan(b))


def probability(x, w):
    """Tell how likely a float32 weight is rounded to another bfloat16 value than w."""
    bits = x.view(np.uint32).astype(np.uint64)
    low = bits & 0xFFFF
    nearer = ((bits - low).astype(np.uint32)).view(np.float32)
    with np.errstate(all="ignore"):
        further = ((bits - low + 0x10000).astype(np.uint32)).view(np.float32)
    found = np.where(changed(nearer, w), 1 - low / 65536, 0) + np.where(
        changed(further, w), low / 65536, 0
    )
    return np.where(np.isnan(x), np.where(np.isnan(w), 0, 1), found)


def check(found, weights, run, groups, rows=ROWS, width=WIDTH, seed=0, start=1, stop=None):
    """Hold a dataset against the definitions, and the last weights against torch's."""
    ahead, free = by_torch(run, seed, start, stop)
    stop = stop or run.setting.steps + 1
    recorded = values_of(run, "param")
    before, after = recorded[start - 1 : stop - 1], recorded[start:stop]
    index, steps = np.arange(rows * width), np.arange(start, stop)
    lost = (index + steps[:, None]) % 3 == 0
    sixteen = run.setting.storage is not FLOAT32
    target = free["float32-master"] if sixteen else after
    names = REMEDIES if sixteen else [n for n in REMEDIES if n[:4] in ("reco", "beta")]
    if run.setting.storage is not BFLOAT16:
        names = [n for n in names if not n.startswith("stochastic")]
    assert found.remedy.values.tolist() == names
    for name in names:
        if name == "recorded":
            landed, own = changed(after, before).astype(float), after
            recovered = np.zeros_like(landed)
        elif name == "stochastic-rounding-expected":
            landed, own = probability(ahead[name], before), free[name]
            recovered = landed * lost
        else:
            landed, own = changed(ahead[name], before), free[name]
            recovered = landed & lost
        moved = changed(own, np.concatenate([before[:1], own[:-1]]))
        if name == "stochastic-rounding-expected" or name == "float32-master":
            first = recorded[start - 1 : start]
            moved = changed(own, np.concatenate([first, own[:-1]]))
        with np.errstate(all="ignore"):
            squares = (own.astype(np.float64) - target) ** 2
        shape = (len(steps), rows, width)
        one = found.sel(remedy=name)
        tokens = moved.reshape(shape).any(axis=2)
        for group, members in groups.members.items():
            of = one.sel(token_group=group)
            total = lambda x: x.reshape(shape)[:, members].sum(axis=(1, 2))  # noqa: B023, E731
            assert np.array_equal(of.landed_count, total(landed)), (name, group)
            assert np.array_equal(of.recovered_count, total(recovered)), (name, group)
            assert np.array_equal(of.free_landed_count, total(moved)), (name, group)
            assert np.array_equal(of.free_moving_tokens, tokens[:, members].sum(axis=1))
            with np.errstate(all="ignore"):
                distance = (
                    np.sqrt(total(squares)) if name != "float32-master" else np.zeros(len(steps))
                )
            assert np.allclose(of.free_distance, distance, rtol=1e-12, atol=0, equal_nan=True), name
        last = (tokens * steps[:, None]).max(axis=0)
        assert np.array_equal(one.last_move, last), name
        fmt = (
            FLOAT32
            if name in ("float32-master", "stochastic-rounding-expected")
            else run.setting.storage
        )
        got = decode(weights[name], fmt).reshape(-1)
        same = (got.view(np.uint32) == own[-1].view(np.uint32)) | (
            np.isnan(got) & np.isnan(own[-1])
        )
        assert same.all(), (name, np.flatnonzero(~same)[:3])


CASES = {
    "plain": (BFLOAT16, Options(), {}),
    "decoupled": (BFLOAT16, Options(maximize=True), {"weight_decay": 0.1}),
    "l2, amsgrad": (BFLOAT16, Options(decoupled=False, amsgrad=True), {"weight_decay": 0.1}),
    "amsgrad": (BFLOAT16, Options(amsgrad=True), {"weight_decay": 0.1, "beta1": 0.3}),
    "float16": (FLOAT16, Options(), {"weight_decay": 0.1, "epsilon": 1e-6}),
    "float32": (FLOAT32, Options(amsgrad=True), {"weight_decay": 0.1}),
    "float32, l2": (FLOAT32, Options(decoupled=False), {"weight_decay": 0.1}),
}


@pytest.fixture
def on_host(monkeypatch):
    """Take every step in NumPy; that programs agree with it is what their self-test is for."""
    monkeypatch.setattr(Stepper, "_verdict", lambda *_: "set aside")


def recorded_in(folder, fmt=BFLOAT16, options=None, maker="loop", steps=STEPS, **given):
    """Return one of torch's runs, and its recording."""
    run = runs.MAKERS[maker].make(runs.setting(fmt, ROWS * WIDTH, steps, options, **given))
    return run, save(folder, run, ROWS, WIDTH)


def by_host(path, monkeypatch, **how):
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "_verdict", lambda *_: "set aside")
        return counterfactual_of(path, **how)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_loops_of_torch(case, tmp_path, on_host):
    fmt, options, given = CASES[case]
    run, path = recorded_in(tmp_path, fmt, options, **given)
    variant = 1 if fmt is FLOAT32 and runs.torch_runs.root() == "mkl-amd" else 0
    how = {"options": options, "groups": groups_of(), "variant": variant}
    found, weights = counterfactual_of(path, window_steps=4, **how)
    check(found, weights, run, groups_of())


def extraordinary(run, seed=1):
    """Put infinities, NaNs, subnormal numbers, zeros of both signs, ties and binade edges into a run."""
    rng = np.random.default_rng(seed)
    patterns = {name: bits.copy() for name, bits in run.patterns.items()}
    for name, bits in patterns.items():
        fmt = run.formats[name]
        sign, infinity, edge = fmt.sign_bit, fmt.infinity, 1 << fmt.significand_bits
        special = [0, sign, 1, sign | 3, infinity, infinity | sign, infinity + 1, infinity - 1, edge, fmt.bias * edge]  # fmt: skip
        drawn = rng.choice(special, bits.shape).astype(bits.dtype)
        anything = rng.integers(0, 1 << fmt.width, bits.shape).astype(bits.dtype)
        if name.endswith("_sq"):
            drawn, anything = (x & (sign - 1) for x in (drawn, anything))
        kind = rng.integers(0, 16, bits.shape)
        kind[:, : bits.shape[1] // 2] = 2  # tokens that are ordinary throughout
        patterns[name] = np.select([kind == 0, kind == 1], [drawn, anything], bits)
    return dataclasses.replace(run, patterns=patterns)


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16])
def test_extraordinary_numbers_on_host(fmt, tmp_path, on_host):
    run = extraordinary(recorded_in(tmp_path, fmt, epsilon=1e-6)[0])
    path = save(tmp_path, run, ROWS, WIDTH)
    found, weights = counterfactual_of(path, groups=groups_of(), seed=3, window_steps=3)
    check(found, weights, run, groups_of(), seed=3)


def test_extraordinary_rows_are_done_again(tmp_path, monkeypatch):
    """Some rows come from one program, others from NumPy or the program in float64; rows are of 260 elements."""
    rows, width = 6, 260
    run = extraordinary(runs.MAKERS["loop"].make(runs.setting(FLOAT32, rows * width, 3)))
    path = save(tmp_path, run, rows, width)
    how = {"groups": groups_of(rows), "beta2": (0.95,), "arithmetic": "torch-capturable"}
    expected, weights = by_host(path, monkeypatch, **how)
    assert expected.free_landed_count.max() > 255
    tried, verdict = set(), Stepper._verdict

    def noted(stepper, plan, formulation, *rest):
        tried.add((formulation, verdict(stepper, plan, formulation, *rest)))
        return verdict(stepper, plan, formulation, *rest)

    monkeypatch.setattr(Stepper, "_verdict", noted)
    for few in (stepping.FEW, 0):
        monkeypatch.setattr(stepping, "FEW", few)
        found, own = counterfactual_of(path, **how)
        xr.testing.assert_identical(found, expected)
        assert all(same_bits(own[name], weights[name], FLOAT32) for name in own)
    assert tried == {("float32", ""), ("float64", "")}


def same_bits(a, b, fmt):
    nan = (a & (fmt.sign_bit - 1)) > fmt.infinity
    return np.array_equal(a[~nan], b[~nan]) and ((b[nan] & (fmt.sign_bit - 1)) > fmt.infinity).all()


def test_programs_windows_and_row_ranges(tmp_path, monkeypatch):
    """Programs over overlapping blocks, long and short windows and row ranges give the same bits."""
    options = Options(amsgrad=False)
    run, path = recorded_in(tmp_path, options=options, weight_decay=0.1)
    groups = groups_of()
    with monkeypatch.context() as patch:
        patch.setattr(counterfactual, "BLOCK", 5 * WIDTH)
        programs, weights = counterfactual_of(path, groups=groups)
    check(programs, weights, run, groups)
    for steps, elements in ((1, None), (3, None), (None, 2 * WIDTH)):
        with monkeypatch.context() as patch:
            if elements:
                patch.setattr(strips, "STRIP_ELEMENTS", elements)
            found, own = by_host(path, patch, groups=groups, window_steps=steps)
        xr.testing.assert_identical(found, programs)
        assert all(np.array_equal(own[name], weights[name]) for name in weights)


def test_width_of_one(tmp_path, on_host):
    run = runs.MAKERS["loop"].make(runs.setting(BFLOAT16, 33, 4))
    path, groups = save(tmp_path, run, 33, 1), groups_of(33)
    check(*counterfactual_of(path, groups=groups), run, groups, rows=33, width=1)


def test_range_of_steps_starts_from_the_recorded_state(tmp_path, on_host):
    run, path = recorded_in(tmp_path, weight_decay=0.1)
    found, weights = counterfactual_of(path, groups=groups_of(), steps=(3, 7), window_steps=3)
    assert found.timestep.values.tolist() == [3, 4, 5, 6]
    check(found, weights, run, groups_of(), start=3, stop=7)


def test_moments_that_part_from_the_recorded_ones(tmp_path, on_host):
    """From an altered moment on, a remedy's own moments are not the recorded ones."""
    run, _ = recorded_in(tmp_path)
    patterns = {name: bits.copy() for name, bits in run.patterns.items()}
    patterns["exp_avg"][4, 7] ^= 0x40
    run = dataclasses.replace(run, patterns=patterns)
    found = counterfactual_of(save(tmp_path, run, ROWS, WIDTH), groups=groups_of(), window_steps=2)
    check(*found, run, groups_of())


# A float32 run of torch itself, fed with the recorded gradients.

MASTERS = {
    "loop": ("loop", 1003, Options(), {"weight_decay": 0.1}),
    "loop, l2, amsgrad": ("loop", 97, Options(decoupled=False, amsgrad=True), {"weight_decay": 0.1}),
    "loop, two threads": ("loop", 32771, Options(threads=2), {"beta1": 0.3}),
    "loop, two threads, l2": ("loop", 65537, Options(decoupled=False, threads=2), {"weight_decay": 0.1}),
    "fused": ("fused", 1003, Options(), {"weight_decay": 0.1}),
    "fused, l2, amsgrad": ("fused", 31, Options(decoupled=False, amsgrad=True), {"weight_decay": 0.1}),
    "fused, two threads": ("fused", 32771, Options(threads=2), {"beta1": 0.3}),
    "one element": ("loop", 1, Options(maximize=True), {}),
}  # fmt: skip


def check_master(tmp_path, kind, size, options, given):
    setting = runs.setting(BFLOAT16, size, 4, options, **given)
    run = runs.MAKERS[kind].make(setting)
    master = runs.MAKERS[f"{kind} on a master"].make(setting)
    assert np.array_equal(master.patterns["grad"], run.patterns["grad"])
    path = save(tmp_path, run, size, 1)
    how = {"arithmetic": f"torch-cpu-{kind}", "options": options, "beta2": ()}
    found, weights = counterfactual_of(path, **how)
    own = decode(master.patterns["param"], FLOAT32)
    assert np.array_equal(weights["float32-master"][:, 0], master.patterns["param"][-1])
    moved = (own[1:] != own[:-1]).sum(axis=1)
    one = found.sel(token_group="all")
    assert np.array_equal(one.free_landed_count.sel(remedy="float32-master"), moved)
    apart = (decode(run.patterns["param"], BFLOAT16).astype(np.float64) - own)[1:]
    distance = np.sqrt((apart**2).sum(axis=1))
    assert np.allclose(one.free_distance.sel(remedy="recorded"), distance, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", MASTERS)
def test_master_is_torchs_own_float32_run(case, tmp_path, on_host):
    check_master(tmp_path, *MASTERS[case])


@pytest.mark.parametrize("beta2", BETAS)
def test_other_beta2_is_torch_with_it(beta2, tmp_path, on_host):
    for kind in ("loop", "foreach", "fused"):
        given = runs.setting(BFLOAT16, ROWS * WIDTH, STEPS, weight_decay=0.1)
        path = save(tmp_path, runs.MAKERS[kind].make(given), ROWS, WIDTH)
        numbers = dataclasses.replace(given.hyperparameters, beta2=beta2)
        other = runs.MAKERS[kind].make(dataclasses.replace(given, hyperparameters=numbers))
        weights = counterfactual_of(path, arithmetic=f"torch-cpu-{kind}")[1]
        assert np.array_equal(weights[f"beta2-{beta2:g}"].reshape(-1), other.patterns["param"][-1])


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16, FLOAT32], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "l2"])
def test_every_base_gives_every_remedy(name, fmt, decoupled, tmp_path, on_host):
    """Kahan summation and moments of another format run on every one; the master is the arithmetic in float32."""
    options = Options(decoupled=decoupled, amsgrad=True)
    rows, width = 12, 8  # whole vectors: NumPy's run has no scalar loop
    given = runs.setting(fmt, rows * width, 3, options, weight_decay=0.1, epsilon=1e-6)
    run = runs.take(given, CATALOGUE[name])
    path = save(tmp_path, run, rows, width)
    found, weights = counterfactual_of(path, arithmetic=name, options=options, beta2=(0.9,))
    single = dataclasses.replace(given, storage=FLOAT32, values=given.values | {"grad": values_of(run, "grad")})  # fmt: skip
    other = dataclasses.replace(given.hyperparameters, beta2=0.9)
    expected = {"beta2-0.9": runs.take(dataclasses.replace(given, hyperparameters=other), CATALOGUE[name])}  # fmt: skip
    if fmt is not FLOAT32:
        mkl = runs.torch_runs.root() == "mkl-amd" and name in (
            "torch-cpu-loop",
            "torch-cpu-foreach",
        )
        root = {"square_root": "mkl-amd"} if mkl else {}
        expected["float32-master"] = runs.take(single, dataclasses.replace(CATALOGUE[name], **root))
        assert (found.free_landed_count.sel(remedy=["kahan", "float32-moments"]) > 0).all()
    for remedy, own in expected.items():
        assert np.array_equal(weights[remedy].reshape(-1), own.patterns["param"][-1]), remedy


# Chance.


def test_random_bits_are_those_of_integers():
    for first in (0, 12345, (1 << 32) - 3):
        number = np.arange(first, first + 7, dtype=np.uint64)
        low, high = number.astype(np.uint32), (number >> np.uint64(32)).astype(np.uint32)
        found = courses.random_bits(courses.step_key(5, 9), low, high)
        assert np.array_equal(found, random16(5, 9, 7, first))


def test_random_bits_look_random():
    """Uniform, and independent of neighbours in tokens, timesteps and seeds: chi-square and correlations."""
    n, keys = 1 << 16, [courses.step_key(seed, t) for seed, t in ((0, 1), (0, 2), (1, 1), (0, 3))]
    low, high = np.arange(n, dtype=np.uint32), np.zeros(1, np.uint32)
    drawn = np.array([courses.random_bits(key, low, high) for key in keys])
    assert drawn.max() < 1 << 16
    for shift in (0, 8):  # 256 bins of 256: sum of squares has a standard deviation of 22.6
        counts = np.stack([np.bincount((x >> shift) & 255, minlength=256) for x in drawn])
        chi = ((counts - 256) ** 2 / 256).sum(axis=1)
        assert (abs(chi - 255) < 5 * 22.6).all()
    centred = np.asarray(drawn / 65536 - 0.5)
    for lag in (1, 2, 5, 64, 256, 4096):
        assert (abs((centred[:, lag:] * centred[:, :-lag]).mean(axis=1)) * 12 * n**0.5 < 5).all()
    between = np.asarray(np.corrcoef(centred))[~np.eye(4, dtype=bool)]
    assert (abs(between) * n**0.5 < 5).all()
    bits = np.stack([drawn >> k & 1 for k in range(16)])
    assert (abs(bits.mean(axis=2) - 0.5) * 2 * n**0.5 < 5).all()


def test_rounding_by_chance_is_torchaos():
    """torchao asks for a draw below the fraction where it adds one that carries: 65,535 less of it."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 1 << 32, 50_000, dtype=np.uint32)
    x = x[(x & 0x7FFFFFFF) < 0x7F800000]
    bits = rng.integers(0, 1 << 16, x.size, np.uint32)
    found = courses.drawn(x, bits)
    away = (65535 - bits) < (x & 0xFFFF)
    assert np.array_equal(found, (x & 0xFFFF0000) + np.where(away, 0x10000, 0).astype(np.uint32))
    pattern = np.array([0x3F801234], np.uint32)
    every = courses.drawn(pattern, np.arange(1 << 16, dtype=np.uint32))
    assert (every == 0x3F810000).sum() == 0x1234 and (every == 0x3F800000).sum() == 0x10000 - 0x1234
    for before in (0x3F800000, 0x3F810000, 0x3F820000, 0xBF800000):
        wanted = (every != before).sum()
        assert courses.chance_of_change(pattern, np.array([before], np.uint32))[0] == wanted


def test_zeros_of_both_signs_are_no_change():
    zero, tiny = np.array([0x80000000], np.uint32), np.array([0x80000005], np.uint32)
    assert courses.chance_of_change(zero, np.array([0], np.uint32))[0] == 0
    assert courses.chance_of_change(tiny, np.array([0], np.uint32))[0] == 5


def test_draw_depends_on_the_seed_alone(tmp_path, on_host):
    run, path = recorded_in(tmp_path)
    one, again, other = (counterfactual_of(path, seed=seed)[1] for seed in (4, 4, 5))
    name = "stochastic-rounding"
    assert np.array_equal(one[name], again[name]) and not np.array_equal(one[name], other[name])
    assert all(np.array_equal(one[k], other[k]) for k in one if k != name)


# Bounds.


class Watching(NumpyOperations):
    """Numbers the operations as the bounds do, and notes which of them met a result that is tiny."""

    def __init__(self):
        self.calls, self.tiny = 0, set()

    def _note(self, result, exact):
        size = np.abs(np.asarray(exact, np.float64))
        if ((size > 0) & (size < 2.0**-126)).any():
            self.tiny.add(self.calls)
        self.calls += 1
        return result

    def add(self, a, b):
        return self._note(super().add(a, b), np.float64(a) + np.float64(b))

    def subtract(self, a, b):
        return self._note(super().subtract(a, b), np.float64(a) - np.float64(b))

    def multiply(self, a, b):
        return self._note(super().multiply(a, b), np.float64(a) * np.float64(b))

    def divide(self, a, b):
        return self._note(super().divide(a, b), np.float64(a) / np.float64(b))

    def fma(self, a, b, c):
        return self._note(super().fma(a, b, c), np.float64(a) * np.float64(b) + np.float64(c))

    def narrow(self, a, fmt=FLOAT32):
        return self._note(super().narrow(a, fmt), a)

    def mkl_amd_sqrt(self, a):
        return NumpyOperations().mkl_amd_sqrt(a)


@pytest.mark.parametrize("name", BASES)
def test_bounds_hold_at_their_edges(name):
    """What is proven is never tiny, for inputs at the edges of what is ordinary; on torch's loop all is proven."""
    options, n, rng = Options(amsgrad=name != "torch-cpu-loop"), 4000, np.random.default_rng(0)
    for fmt in (BFLOAT16, FLOAT16):
        plan, scalars = plan_of(name, fmt, options)
        envelope = Envelope()
        for recipe, values in enumerate(scalars):
            for key, value in values.items():
                envelope.holds((recipe, key), np.atleast_1d(value))
        open_points = courses.unproven(plan, envelope)
        if name == "torch-cpu-loop":
            assert not open_points
        for _ in range(4):

            def draw(key, kept):
                low, high = ORDINARY[key]
                exponent = rng.choice([low, low, low + 1, high - 1, -10, 0], n)
                values = np.ldexp(
                    rng.choice([1, 1 + 2.0**-7, 1.5, 1 + 2.0**-23, rng.random() + 1], n), exponent
                )
                if not key.endswith("_sq"):
                    values *= rng.choice([1, -1], n)
                return round_to((values * rng.choice([1, 1, 1, 0], n)).astype(np.float32), kept)

            recorded = {key: draw(key, kept) for key, kept in plan.formats}
            state = {slot: draw(slot.name, plan.own_format(slot)) for slot in plan.carried}
            tails = [rng.integers(0, 2, n)] * len(plan.steps)
            after = {
                slot.name: draw(slot.name, dict(plan.formats)[slot.name]) for slot in plan.proofs
            }
            ops = Watching()
            with np.errstate(all="ignore"):
                at = courses.Timestep(
                    plan,
                    ops,
                    courses.Before(scalars, recorded, state, tails, np.zeros(n, np.uint32), after),
                )
            assert at.state and not ops.tiny - open_points


def of_size(exponent, sign=None):
    """Return the range of float32 numbers of at least 2^exponent."""
    tags = frozenset({object()}) if sign is None else sign
    return Range(2.0**exponent, 2.0**16, 2.0 ** (exponent - 23), tags)


@pytest.mark.parametrize("least", [-120, -127, -130])
def test_what_may_be_tiny_is_not_proven(least):
    """At a smallest result of 2^least: products, quotients, and sums that cancel down to the last place."""
    tiny, positive, ops = least < -126, frozenset(), RangeOperations
    cases = [
        lambda o: o.multiply(of_size(least + 50), of_size(-50)),
        lambda o: o.divide(of_size(least + 16), of_size(0)),
        lambda o: o.subtract(of_size(least + 23), of_size(-10)),
        lambda o: o.add(of_size(-10), of_size(least + 23)),
        lambda o: o.fma(of_size(-30), of_size(least + 76), of_size(-10)),
        lambda o: o.fma(of_size(-10), of_size(-10), of_size(least + 23)),
        lambda o: o.narrow(o.wide_multiply(of_size(least + 50), of_size(-50))),
    ]
    for k, case in enumerate(cases):
        one = ops()
        case(one)
        assert bool(one.unproven) == tiny, k
    one = ops()  # numbers of one sign do not cancel
    one.add(of_size(-100, positive), of_size(-110, positive))
    assert not one.unproven


def plan_of(name, fmt, options):
    """Return the plan of a base's remedies and the scalars of one step, by way of a small recording."""
    import tempfile
    from pathlib import Path

    found = []
    run = runs.take(
        runs.setting(fmt, 12, 1, options, weight_decay=0.1, epsilon=1e-6), CATALOGUE[name]
    )
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder), run, 3, 4)

        def observers(subject):
            one = Counterfactual(subject)
            found.append(
                (
                    one._plan,
                    [{k: v[0] for k, v in one._scalars_at(c, [1]).items()} for c in one._recipes],
                )
            )
            return []

        ledgers.observe(path, observers, arithmetic=name, options=options)
    return found[0]


# What is told.


def test_dataset_is_labelled(tmp_path, on_host):
    run, path = recorded_in(tmp_path)
    found, weights = counterfactual_of(path, groups=groups_of(), seed=7)
    assert {*found.data_vars} == {*COUNTERFACTUAL}
    for name, field in COUNTERFACTUAL.items():
        assert found[name].dims == field.dims and found[name].dtype == field.dtype
        assert found[name].attrs["long_name"] == field.long_name
    said = json.loads(found.attrs["remedies"])
    assert [*said] == found.remedy.values.tolist() == REMEDIES
    assert all({"summary", "arithmetic", "formula"} <= {*each} for each in said.values())
    assert said["stochastic-rounding"]["seed"] == 7
    assert said["beta2-0.8"]["hyperparameters"] == {"beta2": 0.8}
    assert "recorded ones under every remedy" in found.attrs["gradients"]
    assert weights["recorded"].shape == (ROWS, WIDTH)
    assert np.array_equal(weights["recorded"].reshape(-1), run.patterns["param"][-1])


def test_square_root_is_that_of_the_recording(tmp_path, on_host):
    """Without a probe of the machine the master takes IEEE 754's."""
    run, path = recorded_in(tmp_path)
    probed = json.loads(counterfactual_of(path)[0].attrs["remedies"])["float32-master"]
    bare = runs.save(path.with_name("bare.safetensors"), run)
    plain = json.loads(counterfactual_of(bare)[0].attrs["remedies"])["float32-master"]
    mkl = "square root of MKL on AMD"
    assert (mkl in probed["arithmetic"]) == (runs.torch_runs.root() == "mkl-amd")
    assert mkl not in plain["arithmetic"]


def test_what_it_needs(tmp_path):
    run, path = recorded_in(tmp_path)
    bare = runs.save(path.with_name("bare.safetensors"), run, drop=("grad_W",))
    without = runs.save(path.with_name("b.safetensors"), run, drop=("momentum_W", "variance_W"))
    told = []
    for file, steps in (
        (path, (1, 8)),
        (path, (3, 5)),
        (bare, (1, 8)),
        (without, (1, 8)),
        (without, (3, 5)),
    ):
        with jaxaudit.open_recording(file) as recording:
            bench = workbench.Workbench(recording, (find_device("cpu"),), steps, 1)
            for options in (Options(), Options(amsgrad=True)):
                candidate = workbench.Candidate(
                    CATALOGUE[BASES[0]], options, ledgers.given_by(recording)
                )
                told.append(Counterfactual.possible(Subject(bench, candidate, groups_of(), steps)))
            told.append(Counterfactual.possible(Subject(bench, None, groups_of(), steps)))
    yes, no, known = [True, True, False], [False, False, False], [True, False, False]
    assert told == yes + known + no + yes + no


def test_moments_that_were_not_recorded(tmp_path, on_host):
    run, path = recorded_in(tmp_path, weight_decay=0.1)
    found, weights = counterfactual_of(path, groups=groups_of())
    bare = save(tmp_path, run, ROWS, WIDTH, drop=("momentum_W", "variance_W"))
    again, own = counterfactual_of(bare, groups=groups_of(), window_steps=3)
    xr.testing.assert_identical(again, found)
    assert all(np.array_equal(own[name], weights[name]) for name in weights)


def test_other_arithmetics_are_compared_with_torchs_loop(tmp_path, on_host):
    _, path = recorded_in(tmp_path)
    found, weights = counterfactual_of(path)
    for name in ("torch-capturable", "optax"):
        again, own = counterfactual_of(path, arithmetic=name)
        xr.testing.assert_equal(again, found)
        assert all(np.array_equal(own[remedy], weights[remedy]) for remedy in weights)


@pytest.mark.parametrize("width", [64, 3000])
def test_the_self_test_holds_for_rows_of_any_width(tmp_path, width):
    """Among many hard numbers some are not ordinary: a row of them would never be, and instructions not be trusted."""
    setting = runs.setting(BFLOAT16, 20 * width, 2)
    path = save(tmp_path, runs.MAKERS["loop"].make(setting), 20, width)
    with jaxaudit.open_recording(path) as recording:
        found = auditing.audit_groups(recording, arithmetics="torch-cpu-loop")
    told = json.loads(found[""].attrs["self_test"])
    assert told["remedies in float32"] == "passed"
    assert "remedies in float64" not in told
