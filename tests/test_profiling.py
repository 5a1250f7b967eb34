"""Counted work against sums made by hand, measurements on hand-made clocks, and `profile` end to end."""

import copy
import gzip
import json
import mmap
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from methods_cases import case, checkpointed, setup_of
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import talos_fast as talos
from talos_fast.cli import app
from talos_fast.methods import METHODS
from talos_fast.profiling.iteration import PHASES, FinetuneIteration
from talos_fast.profiling.measure import Timings, interleave, peak
from talos_fast.profiling.memory import Memory, above
from talos_fast.profiling.work import _formulas, count_work, step_bytes, touched_sectors

CPU = torch.device("cpu")
N, SIZES = 5, (7, 11, 13, 3)


def chain(trained: tuple[int, ...]) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(SIZES)))
    for number, layer in enumerate(model):
        layer.requires_grad_(number in trained)
    return model


def count(model, x, masks=None):
    return count_work(lambda: model(x).sum(), dict(model.named_parameters()), masks)


class TestWork:
    def test_everything_trains(self):
        work = count(chain((0, 1, 2)), torch.randn(N, 7))
        products = [2 * N * i * o for i, o in pairwise(SIZES)]
        assert work.forward == work.weight_gradients == work.selected_gradients == sum(products)
        assert work.activation_gradients == sum(products[1:])  # the input needs none
        assert work.saved_bytes == 4 * N * (7 + 11 + 13)
        assert work.done == work.floor == 2 * sum(products) + sum(products[1:])

    def test_the_backward_pass_ends_at_the_lowest_layer_that_trains(self):
        mask = torch.zeros(13, 11, dtype=torch.bool)
        mask[2:6, 3] = True
        work = count(chain((1,)), torch.randn(N, 7), {"1.weight": mask})
        assert work.activation_gradients == 2 * N * 13 * 3
        assert work.weight_gradients == 2 * N * 11 * 13
        assert work.selected_gradients == 2 * N * 11 * 4
        assert work.saved_bytes == 4 * N * 11  # the input of the layer that trains, and nothing else
        assert work.done - work.floor == 2 * N * 11 * 9

    def test_convolution(self):
        model = nn.Conv2d(3, 8, 4, stride=4)
        work = count(model, torch.randn(2, 3, 16, 16))
        assert work.forward == work.weight_gradients == 2 * (2 * 16) * 8 * 48
        assert work.activation_gradients == 0

    @pytest.mark.parametrize("model", [
        nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, stride=2, groups=4), nn.ConvTranspose2d(8, 4, 3, stride=2),
        nn.ConvTranspose2d(8, 4, 3, groups=4),
    ])  # fmt: skip
    def test_grouped_and_transposed_convolutions(self, model):
        """Each gradient is as many products as the convolution itself."""
        work = count(model, torch.randn(2, 8, 11, 11, requires_grad=True))
        assert work.forward == work.activation_gradients == work.weight_gradients > 0

    @pytest.mark.parametrize("kind", ["flash", "cudnn"])
    def test_keys_that_serve_several_heads(self, kind):
        query, key = (torch.empty(2, heads, 16, 64, dtype=torch.bfloat16, device="meta") for heads in (8, 2))
        formula = _formulas()[getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention")]
        assert formula(query, key, key) == 2 * 2 * 2 * 8 * 16 * 16 * 64

    def test_what_checkpoints_repeat_is_no_gradient(self):
        class Checkpointed(nn.Sequential):
            def forward(self, x):
                for layer in self:
                    x = checkpoint(layer, x, use_reentrant=False)
                return x

        plain = chain((0, 1, 2))
        expected, work = count(plain, torch.randn(N, 7)), count(Checkpointed(plain), torch.randn(N, 7))
        assert work.repeated > 0 and work.done == expected.done + work.repeated
        assert (work.floor, work.activation_gradients) == (expected.floor, expected.activation_gradients)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bytes_of_a_step_are_those_of_the_state(self, dtype):
        p, mask = nn.Parameter(torch.zeros(64, 64, dtype=dtype)), torch.zeros(64, 64, dtype=torch.bool)
        mask[:8] = True  # whole sectors
        for optimizer, masks in ((torch.optim.AdamW([p]), None), (talos.MaskedAdam([p], masks=[mask]), {"p": mask})):
            p.grad = torch.zeros_like(p)
            optimizer.step()
            entries = p.numel() if masks is None else int(mask.sum())
            state = sum(value.nbytes for name, value in optimizer.state[p].items() if name != "step")
            index = 0 if masks is None else min(2 * entries, p.numel() // 8)
            assert step_bytes({"p": p}, masks) == 3 * entries * p.element_size() + 2 * state + index

    def test_attention_and_autocast(self):
        layer = nn.MultiheadAttention(16, 2, batch_first=True)
        x = torch.randn(3, 5, 16)

        def loss():
            return layer(x, x, x, need_weights=False)[0].sum()

        projections = 2 * (3 * 5) * 16 * (48 + 16)
        scores = 2 * 2 * (3 * 2) * 5 * 5 * 8
        fused = count_work(loss, dict(layer.named_parameters()))
        with sdpa_kernel(SDPBackend.MATH):
            plain = count_work(loss, dict(layer.named_parameters()))
        assert fused.forward == plain.forward == projections + scores
        assert fused.weight_gradients == projections
        with torch.autocast("cpu", torch.bfloat16):
            low = count_work(loss, dict(layer.named_parameters()))
        assert low.weight_gradients == projections
        assert all(p.grad is None for p in layer.parameters())

    def test_casts_of_parameters_are_no_activations(self):
        model = chain((1, 2))
        with torch.autocast("cpu", torch.bfloat16):
            work = count(model, torch.randn(N, 7))
        assert work.saved_bytes == 2 * N * (11 + 13)

    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_is_counted(self, method, tmp_path):
        """The floor of a linear method is what its tangents cost beside the pass of the values."""
        model, batches = case("clip", tmp_path)
        iteration = FinetuneIteration(setup_of(model, method), model, batches[0], functional.cross_entropy, 1.0, "off")
        work = iteration.work(iteration.setup.mask)
        model, batches = case("clip", tmp_path)
        full = FinetuneIteration(setup_of(model, "nonlinear"), model, batches[0], functional.cross_entropy, 1.0, "off")
        plain = full.work()
        assert work.forward == plain.forward if method not in ("linearized", "l-lora") else work.forward > plain.forward
        assert work.floor <= work.done and work.saved_bytes > 0
        if method in ("talos", "lota"):
            assert work.floor < plain.done and work.saved_bytes <= plain.saved_bytes

    def test_of_a_linear_method_the_start_is_no_activation_and_checkpoints_run_again(self, tmp_path):
        model, batches = case("clip", tmp_path)
        setup, batch = setup_of(model, "linearized"), batches[0]

        def work(n):
            part = tuple(tensor[:n] for tensor in batch)
            return FinetuneIteration(setup, model, part, functional.cross_entropy, 1.0, "off").work()

        half, whole = work(2), work(4)
        assert 2 * half.saved_bytes - whole.saved_bytes < sum(p.nbytes for p in model.parameters()) / 2
        checkpointed(model, "clip")
        again = work(4)
        assert again.repeated > 0 and again.saved_bytes < whole.saved_bytes

    def test_bytes_of_a_step(self):
        p = {"w": torch.zeros(4, 16), "b": torch.zeros(4)}
        assert step_bytes(p) == 28 * 68
        mask = torch.zeros(4, 16, dtype=torch.bool)
        mask[0, :8] = mask[2, 3] = True
        assert touched_sectors(mask) == 2
        assert touched_sectors(mask, width=2) == 2
        # parameter twice and gradient once in whole sectors, two moments twice, one bit an entry of w
        assert step_bytes(p, {"w": mask}) == 3 * 32 * 2 + 16 * 9 + 8 + 28 * 4
        assert touched_sectors(torch.ones(9, dtype=torch.bool)) == 2
        assert step_bytes({"v": torch.zeros(9)}, {"v": torch.ones(9) > 0}) == 3 * 32 * 2 + 16 * 9 + 2
        assert step_bytes({"v": torch.zeros(64)}, {"v": torch.arange(64) == 9}) == 3 * 32 + 16 + 2  # 16 bits an entry


class Recorded:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def prepare(self):
        self.log.append(f"prepare {self.name}")

    def run(self, mark):
        for _ in PHASES:
            mark()
        self.log.append(self.name)


class TestMeasure:
    def test_rounds_are_interleaved_and_warm_ups_not_counted(self):
        log = []
        timings = interleave({n: Recorded(n, log) for n in "ab"}, CPU, warmup=1, rounds=2)
        assert log == ["prepare a", "a", "prepare b", "b"] * 3
        assert {name: len(t.of()) for name, t in timings.items()} == {"a": 2, "b": 2}

    def test_ratios_are_of_the_same_round(self):
        mine = Timings({p: [1.0, 10.0, 2.0] for p in PHASES})
        theirs = Timings({p: [2.0, 20.0, 1.0] for p in PHASES})
        assert mine.median() == 8.0
        assert mine.median("clip", "step") == 4.0
        assert mine.ratio(theirs) == 0.5

    def test_a_pass_that_keeps_the_host_busy_is_told_from_others(self):
        phases = {p: [1.0, 3.0, 2.0] for p in PHASES}
        assert Timings(phases, [1.0, 2.9, 1.9]).host_was_busy
        assert not Timings(phases, [1.0, 2.5, 1.7]).host_was_busy and not Timings(phases).host_was_busy

    def test_peak_is_seen_though_it_is_freed(self):
        def run():
            torch.ones(16 * 2**20)
            torch.ones(2**20)

        memory = Memory(CPU)
        before, found = memory.held(), memory.peak(run)
        if before is None or found is None:
            pytest.skip("this system does not let a process reset its high-water mark")
        assert 60 * 2**20 < found - before < 90 * 2**20
        assert memory.held() < found - 50 * 2**20

    def test_what_is_held_is_what_the_system_counts_in_pages(self):
        found = Memory(CPU).held()
        if found is None:
            pytest.skip("this system does not say")
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        assert found == pytest.approx(pages * mmap.PAGESIZE, rel=0.01)

    @pytest.mark.parametrize("compiles", [False, True])
    def test_what_compiling_tries_out_is_not_in_the_peak(self, compiles):
        class First(Recorded):
            def run(self, mark):
                torch.ones((1 if self.log.count(self.name) else 16) * 2**20)
                super().run(mark)

        log, memory = [], Memory(CPU)
        before, found = memory.held(), peak(First("a", log), memory, compiles)
        assert log.count("a") == (4 if compiles else 2)
        if before is None or found is None:
            pytest.skip("this system does not let a process reset its high-water mark")
        assert (found - before > 60 * 2**20) is not compiles

    def test_a_reading_that_is_missing_gives_none(self):
        assert above(3, 10) == 7 and above(10, 3) == 0
        assert above(None, 10) is None and above(3, None) is None

    @pytest.mark.gpu
    def test_on_a_gpu(self):
        device = torch.device("cuda")
        torch.cuda.empty_cache()  # of a block that is a little larger the whole would be handed out, and counted
        kept, memory = torch.ones(1, device=device), Memory(device)
        before = memory.held()
        assert kept.device.type == "cuda"
        assert memory.peak(lambda: torch.ones(2**20, device=device)) == before + 4 * 2**20
        timings = interleave({"a": Recorded("a", [])}, device, warmup=0, rounds=2)
        assert len(timings["a"].of()) == len(timings["a"].host) == 2
        assert min(timings["a"].of()) >= 0


class Net(nn.Module):
    """Two layers, dropout, and a buffer that each forward changes."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(6, 8), nn.Linear(8, 3), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.second(self.drop(self.first(x).relu()))


def batches():
    return [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))]


def mask_of(model):
    mask = torch.zeros(8, 6, dtype=torch.bool)
    mask[:2, 1:3] = True
    return talos.Mask({"first.weight": mask})


class TestProfile:
    def test_the_model_is_left_as_it_was(self, tmp_path):
        model = Net().eval()
        model.second.bias.requires_grad_(False)
        before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        data = batches()
        torch.set_rng_state(random)
        found = talos.profile(model, data, mask=mask_of(model), rounds=2, warmup=1, trace=tmp_path / "trace.json")
        assert torch.equal(torch.get_rng_state(), random)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert not model.training
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"second.bias"}
        assert all(p.grad is None for p in model.parameters())
        assert list(found.rows) == ["nonlinear", "talos"]
        assert found.rows["talos"].trained == 4
        assert found.rows["nonlinear"].trained == 8 * 6 + 8 + 3 * 8
        assert any(
            event.get("name") == "aten::addmm"
            for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        )

    def test_counts_and_text(self):
        model = Net()
        found = talos.profile(model, batches(), mask=mask_of(model), rounds=2, warmup=0, clip=None)
        full, sparse = found.rows["nonlinear"].work, found.rows["talos"].work
        assert full.done == 2 * 4 * (2 * 48 + 3 * 24)
        assert sparse.floor == 2 * 4 * (48 + 2 * 24 + 48 * 2 // 8)
        content = json.loads(json.dumps(found.to_json()))
        assert content["batch"] == 4 and content["rounds"] == 2 and content["device"] == "cpu"
        assert len(content["rows"]["talos"]["timings"]["seconds"]["step"]) == 2
        assert found.ratio("nonlinear") == 1.0
        text = str(found)
        assert "Net" in text and "/ nonlinear" in text and "GFLOP" in text and "clip+step" in text

    def test_methods_share_a_model_and_each_freezes_its_own_in_every_round(self):
        model, asked, seen = Net().eval(), [], []

        def forward(model, batch):
            asked.append([name for name, p in model.named_parameters() if p.requires_grad])
            assert model.training
            return -model(batch[0])

        def loss(logits, labels):
            seen.append(logits)
            return functional.cross_entropy(logits, labels)

        talos.profile(model, batches(), mask=mask_of(model), rounds=2, warmup=1, forward=forward, loss=loss)
        assert asked[-6:] == [[name for name, _ in model.named_parameters()], ["first.weight"]] * 3
        assert len(seen) == len(asked)

    def test_compiled(self):
        model = Net()
        found = talos.profile(model, batches(), mask=mask_of(model), rounds=1, warmup=0, compile=True)
        assert found.rows["talos"].work.floor == 2 * 4 * (48 + 2 * 24 + 48 * 2 // 8)
        assert found.about["compiled"] and "interleaved, compiled" in str(found)
        assert torch._dynamo.utils.counters["frames"]["ok"] > 0

    def test_a_trace_that_cannot_be_written_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "folder.json").mkdir()
        options = {"method": "nonlinear", "rounds": 1, "warmup": 0}
        with pytest.raises(talos.TalosError, match="folder.json: a folder"):
            talos.profile(Net(), batches(), trace=tmp_path / "folder.json", **options)

        (tmp_path / "trace.json").write_text("an earlier one")
        (tmp_path / "trace.json.gz").write_bytes(gzip.compress(b"an earlier one"))
        monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda *_: None)  # as on a full disk
        for name in ("trace.json", "trace.json.gz"):
            before = (tmp_path / name).read_bytes()
            with pytest.raises(talos.TalosError, match="cannot be written"):
                talos.profile(Net(), batches(), trace=tmp_path / name, **options)
            assert (tmp_path / name).read_bytes() == before
        assert len(list(tmp_path.iterdir())) == 3

    @pytest.mark.parametrize("clip", [0.25, None])
    def test_gradients_are_clipped_as_one_asks(self, monkeypatch, clip):
        limits, clipped = [], nn.utils.clip_grad_norm_

        def watched(parameters, limit):
            limits.append(limit)
            return clipped(parameters, limit)

        monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched)
        talos.profile(Net(), batches(), method="nonlinear", rounds=1, warmup=0, clip=clip)
        assert set(limits) == {clip or torch.inf} and len(limits) == 3  # two for the peak, and the round

    @pytest.mark.parametrize("amp", ["off", "bf16"])
    def test_what_is_measured_is_cast_as_one_asks(self, amp):
        seen = set()

        def forward(model, batch):
            seen.add(torch.is_autocast_enabled("cpu"))
            return model(batch[0])

        found = talos.profile(Net(), batches(), method="nonlinear", forward=forward, amp=amp, rounds=1, warmup=0)
        assert seen == {amp == "bf16"} == {found.about["bf16"]}
        assert ("bf16 autocast" if amp == "bf16" else "float32") in str(found)

    def test_full_fine_tuning_alone(self):
        assert list(talos.profile(Net(), batches(), method="nonlinear", rounds=1, warmup=0).rows) == ["nonlinear"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rounds": 0}, "rounds=0"),
            ({"warmup": -1}, "warmup=-1"),
            ({"batches": []}, "there is no batch"),
            ({"mask": None}, "needs mask="),
            ({"mask": None, "method": "lota"}, "needs finetuned="),
            ({"method": "nonlinear"}, "mask= means nothing to method 'nonlinear'"),
            ({"trace": "/no/such/folder/trace.json"}, "trace=/no/such/folder/trace.json"),
            ({"trace": "trace.txt"}, "trace=trace.txt: a Chrome trace is .json or .json.gz"),
            ({"amp": "fp8"}, "amp='fp8': choose"),
            ({"clip": 0.0}, "clip=0.0: the largest gradient norm must be positive"),
            ({"clip": float("nan")}, "clip=nan: the largest gradient norm must be positive"),
        ],
    )
    def test_errors(self, arguments, message):
        model = Net()
        data = arguments.pop("batches", batches())
        with pytest.raises(talos.TalosError, match=message):
            talos.profile(model, data, **{"mask": mask_of(model), "rounds": 1, "warmup": 0, **arguments})
        assert all(p.requires_grad for p in model.parameters())


def test_command(tmp_path):
    out, trace = tmp_path / "profile.json", tmp_path / "trace.json.gz"
    arguments = ["profile", "--model", "tiny", "--data", "demo:digits", "--method", "nonlinear", "--rounds", "1"]
    result = CliRunner().invoke(
        app, [*arguments, "--warmup", "0", "--batch-size", "4", "--out", str(out), "--trace", str(trace)]
    )
    assert result.exit_code == 0, result.output
    assert "nonlinear" in result.output and trace.stat().st_size > 0
    content = json.loads(out.read_text())
    assert content["model"] == "tiny" and content["task"] == "digits" and content["rows"]["nonlinear"]["work"]
