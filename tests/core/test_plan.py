"""Plans against real ranks: memory as the kernel sees it, bytes as they were sent; against formulas; and the
command."""
import collections
import contextlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from xtf import layout, models, plan
from xtf.moe import Router
from xtf.plan import step as planned
from xtf.plan.ledger import Ledger
from xtf.plan.machines import EFFICIENCY, MACHINES, roofline
from xtf.testing import pool

DENSE = {"model_type": "qwen3", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768,
         "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
EXPERTS = DENSE | {"model_type": "qwen3_moe", "moe_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 4,
                   "norm_topk_prob": True}
LATENT = {"model_type": "deepseek_v3", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512,
          "moe_intermediate_size": 128, "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4,
          "num_key_value_heads": 4, "n_routed_experts": 8,
          "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "kv_lora_rank": 32, "q_lora_rank": 64,
          "qk_nope_head_dim": 32,
          "qk_rope_head_dim": 16, "v_head_dim": 32, "num_nextn_predict_layers": 1}


def family(hf: dict):
    module = models.FAMILIES[hf["model_type"]]
    return module, module.config(hf)


class Noted:
    """`exact`, and what it said."""
    rows = pairs = None

    def __init__(self):
        self.said = []

    def sizes(self, sent):
        from xtf.parallel import exact
        self.said.append(exact().sizes(sent))
        return self.said[-1]


class Told:
    """What was noted elsewhere."""
    rows = pairs = None

    def __init__(self, said):
        self.said = iter(said)

    def sizes(self, sent):
        return next(self.said)


def really(hf: dict, sizes: dict, seq_len: int, packs: int, dtype: str, remat: bool) -> tuple:
    """On a real rank: (peak bytes of a step, its messages, what `exact` said). The peak is the kernel's: every large
    tensor has pages of its own."""
    import ctypes
    import gc

    import xtf
    from xtf import tree
    from xtf.data.batch import Batch, cut
    from xtf.layout import PACK_AXES
    from xtf.parallel import collectives, mesh
    libc = ctypes.CDLL(None)
    for option in (-3, -1):                                          # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        libc.mallopt(option, 1 << 16)

    def pages(field: str) -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

    model, cfg = family(hf)
    step, tx, watch = plan.training_step(model, cfg, "fp32")
    ranks, strategy = mesh(**sizes), Noted()
    step = xtf.shard(step, *plan.transforms(cfg, dtype, remat, strategy), mesh=ranks, specs=model.specs(cfg))
    params = xtf.init(step.specs, 0, step.layout)
    state = xtf.TrainState.create(params, tx.init(params), watch.init("cpu"))
    del params
    total = packs * math.prod(sizes.get(a, 1) for a in PACK_AXES)
    ids = torch.randint(cfg.vocab_size, (total, seq_len), generator=torch.Generator().manual_seed(0))
    ends = planned._full(total, seq_len, 1, 1, "cpu")
    batch = cut(Batch(ids, ids, ends.loss_mask, ends.positions, ends.segments, ends.lengths), ranks)
    for _ in range(2):  # the first step makes what later ones keep (threads, groups, caches)
        strategy.said.clear()
        gc.collect()
        libc.malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")                                          # the peak is what is resident now
        held = {local.data_ptr(): local.nbytes() for x in tree.leaves((state, batch)) if x is not None
                for local in [layout.local(x).untyped_storage()]}
        before = pages("VmRSS")
        with collectives.record() as sent:
            state, _ = step(state, batch)
        more = pages("VmHWM") - before
    return sum(held.values()) + more, planned._messages(sent, ranks), strategy.said


@pytest.mark.parametrize("hf, sizes, packs, dtype, remat", [
    (DENSE, {"dp": 2, "sp": 2}, 1, "fp32", False),
    (DENSE, {"dp": 2}, 2, "bf16", True),
    (EXPERTS, {"dp": 2, "ep": 2}, 1, "fp32", False),
    pytest.param(DENSE, {"replicate": 2, "dp": 2}, 2, "fp32", True, marks=pytest.mark.slow),
    pytest.param(EXPERTS, {"ep": 2, "sp": 2}, 1, "bf16", True, marks=pytest.mark.slow),
    pytest.param(LATENT, {"dp": 2, "ep": 2}, 1, "fp32", True, marks=pytest.mark.slow),
], ids=lambda x: x["model_type"] if isinstance(x, dict) and "model_type" in x else str(x))
def test_predicted_is_measured_on_real_ranks(hf, sizes, packs, dtype, remat):
    """Peak memory within 10 %, bytes of every collective and axis exactly."""
    answers = pool(math.prod(sizes.values())).run(really, hf, sizes, 512, packs, dtype, remat)
    peak, messages, said = answers[0]
    model, cfg = family(hf)
    seen = plan.measure(model, cfg, sizes, seq_len=512, packs=packs, dtype=dtype, remat_=remat, kind="cpu",
                        strategy=Told(said))
    assert seen.messages == messages
    assert abs(seen.peak / peak - 1) < 0.1, (seen.peak, peak, seen.memory)
    assert sum(seen.memory.values()) == seen.peak


def test_a_step_on_1024_ranks_is_a_part_of_one_processs():
    """Work over all ranks is one process's; products with weights are 3 times the model's forward FLOPs of them."""
    model, cfg = family(EXPERTS | {"num_experts": 64, "vocab_size": 4096})
    seen = plan.measure(model, cfg, {"dp": 16, "ep": 32, "sp": 2}, seq_len=512)
    one = plan.measure(model, cfg, {}, seq_len=512)
    for work in ("products", "experts", "attention"):
        # 512 packs; rows are whole numbers
        assert seen.flops[work] * 1024 == pytest.approx(one.flops[work] * 512, rel=1e-3), work
    assert seen.tokens == 512 * 512
    attention = 4 * cfg.num_attention_heads * cfg.head_dim * 3 * 512 * 513 // 2
    assert one.flops["products"] + one.flops["experts"] == 3 * (model.flops(cfg, [512]) - attention)
    assert one.flops["attention"] == attention * 7 // 2  # flash attention computes the scores again in backward
    halves = plan.measure(model, cfg, {}, seq_len=512, documents=2)
    assert halves.flops["attention"] == 4 * cfg.num_attention_heads * cfg.head_dim * 3 * 256 * 257 * 7 // 2
    assert one.memory["parameters"] == 4 * one.parameters and one.memory["optimizer"] >= 8 * one.parameters


def test_gathered_weights_and_messages_do_not_grow_with_the_layers():
    few, many = (plan.measure(*family(EXPERTS | {"num_hidden_layers": n}), {"dp": 8}, seq_len=512, remat_=True)
                 for n in (4, 8))
    assert few.memory["buffers"] == many.memory["buffers"] > 0


def test_the_ledger_sees_through_modes_that_are_off_and_keeps_real_integers_real():
    from torch.utils._python_dispatch import _disable_current_modes
    real = torch.arange(4)
    with Ledger() as ledger:
        fake = torch.empty(1000)
        with _disable_current_modes():
            hidden = fake.new_empty(500)
        twice = real + real
        assert twice.tolist() == [0, 2, 4, 6] and ledger.now == 6032
        del twice
        ledger.mark("buffers", [hidden])
        view = hidden[:10]
        del hidden
        assert ledger.now == 6000
        del view
        assert ledger.now == 4000 and ledger.at_peak() == {"parameters": 0, "gradients": 0, "optimizer": 0,
                                                           "activations": 4032, "buffers": 2000}
        ledger.start(limit=5000)
        with pytest.raises(MemoryError, match="8,000 bytes"):
            fake + 1


@pytest.mark.parametrize("router, ranks", [
    (Router(16, 4), 4), (Router(32, 4, groups=8, top_groups=3), 4), (Router(32, 4, groups=4, top_groups=2), 8)])
def test_balanced_rows_are_those_of_random_choices(router, ranks):
    """20,000 tokens that choose groups and then experts at random."""
    T, generator = 20_000, torch.Generator().manual_seed(0)
    draw = lambda n, k: torch.rand(T, n, generator=generator).topk(k).indices
    per_group = router.num_experts // router.groups
    inside = draw(router.top_groups * per_group, router.top_k)
    experts = draw(router.groups, router.top_groups).gather(1, inside // per_group) * per_group + inside % per_group
    rows = torch.zeros(T, ranks).scatter_(1, experts // (router.num_experts // ranks), 1).sum(0)
    Sent = collections.namedtuple("Sent", "experts_TK mine_R")
    send, recv, pairs = plan.Balanced(router, None, False).sizes(Sent(experts, rows))
    assert len(set(send)) == 1 and recv == send and pairs == T * router.top_k
    assert send[0] == pytest.approx(rows.mean().item(), rel=0.01)


def test_counts_plan_the_fullest_rank_layer_by_layer():
    Sent = collections.namedtuple("Sent", "experts_TK mine_R")
    sent = Sent(torch.zeros(100, 1), torch.zeros(2))
    strategy = plan.Balanced(Router(4, 1), [[0.1, 0.1, 0.4, 0.4], [0.25] * 4], again=True)
    said = [strategy.sizes(sent) for _ in range(5)]
    assert said[:2] == [([80, 20], [80, 80], 160), ([50, 50], [50, 50], 100)]
    assert said[2:] == [said[1], said[0], said[0]]  # backward recomputes in reverse; then the next micro-batch


def test_the_roofline_of_known_work():
    machine = MACHINES["h100"]
    work = collections.Counter({("products", 7 * 10**14, 1): 1, ("passes", 0, int(3.35e12)): 2,
                                ("optimizer", 0, int(3.35e12)): 1})
    times = roofline(machine, work, [("all_to_all", 16, 8, 15 * 10**9), ("all_gather", 16, 8, 15 * 10**9)])
    assert times.products == pytest.approx(7e14 / (989e12 * 0.7)) and times.passes == pytest.approx(2 * 0.5 / 0.8)
    # half of the others are out of the node, each through its own link
    assert times.exposed == pytest.approx(8e9 / 50e9 / 0.8)
    assert times.hidden == pytest.approx(max(15e9 / 450e9, 8e9 / 8 / 50e9) / 0.8)
    assert times.step == pytest.approx(times.products + times.passes + times.exposed + times.optimizer)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(EXPERTS))
    return str(tmp_path)


def test_one_json_object_and_a_table(directory, capsys):
    argv = [directory, "--world", "16", "--mesh", "dp=4,ep=4", "--seq-len", "256"]
    plan.main([*argv, "--json"])
    one = json.loads(capsys.readouterr().out)
    assert one["fits"] and one["mesh"] == {"dp": 4, "ep": 4} and sum(one["memory"].values()) == one["peak"]
    messages = {(m["kind"], *m["axes"]) for m in one["messages"]}
    assert messages >= {("all_to_all", "ep"), ("all_gather", "dp"), ("all_gather", "dp", "ep")}
    plan.main(argv)
    text = capsys.readouterr().out
    assert f"{one['peak'] / 1e9:.3f}   fits into 73.6 GB" in text
    assert f"{one['tokens_per_second_per_device']:,.0f} tokens/s a device" in text


def test_search_ranks_what_fits(directory, capsys, monkeypatch):
    argv = [directory, "--world", "2", "--seq-len", "1024", "--search", "--json"]
    plan.main(argv)
    most = max(r["peak"] for r in json.loads(capsys.readouterr().out) if "replicate" not in r["mesh"])
    monkeypatch.setitem(plan.MACHINES, "h100", MACHINES["h100"]._replace(memory=0.99 * most / EFFICIENCY["capacity"]))
    plan.main(argv)
    out = capsys.readouterr()
    found = json.loads(out.out)
    rates = [r["tokens_per_second_per_device"] for r in found]
    assert found and rates == sorted(rates, reverse=True) and all(r["fits"] for r in found)
    assert "does not fit" in out.err and any(r["remat"] for r in found) and not all(r["remat"] for r in found)
    assert {tuple(r["mesh"].values())[-3:] for r in found} <= {(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 1)}
    assert "of 4 meshes" in out.err


def test_search_runs_nothing_that_cannot_fit(directory, capsys, monkeypatch):
    """Parameters and moments of a rank are more than the machine has: nobody runs that step."""
    monkeypatch.setitem(plan.MACHINES, "h100", MACHINES["h100"]._replace(memory=16e6))
    monkeypatch.setattr("xtf.plan._search.report", None)
    with pytest.raises(SystemExit, match="no mesh of 2 ranks fits"):
        plan.main([directory, "--world", "2", "--seq-len", "64", "--search"])
    err = capsys.readouterr().err
    assert "replicate=2: does not fit: parameters and moments alone are 0.1 GB" in err and err.count("alone") == 4


def test_recipes_flags_are_planned(directory, capsys):
    """Adapters: gradients and moments of them alone, FLOPs by what is trained; overlap: the experts' messages hide."""
    def planned(*argv):
        plan.main([directory, "--world", "4", "--seq-len", "64", "--json", *argv])
        return json.loads(capsys.readouterr().out)
    whole, adapters = planned("--mesh", "dp=4"), planned("--mesh", "dp=4", "--lora", "4")
    assert adapters["memory"]["optimizer"] < 0.2 * whole["memory"]["optimizer"] and adapters["lora"] == 4
    assert adapters["memory"]["parameters"] < 0.7 * whole["memory"]["parameters"]  # frozen matrices in bf16
    flops = lambda r: sum(r["flops"][kind] for kind in ("products", "experts", "attention"))
    assert 0.6 < flops(adapters) / flops(whole) < 0.8                # two thirds: no gradients of frozen weights
    travel, hidden = planned("--mesh", "ep=4", "--packs", "2"), planned("--mesh", "ep=4", "--packs", "2", "--overlap")
    assert hidden["seconds"]["exposed"] < travel["seconds"]["exposed"] and hidden["overlap"]
    sent = lambda r: sum(m["bytes"] for m in r["messages"] if m["kind"] == "all_to_all")
    assert sent(hidden) == pytest.approx(sent(travel), rel=0.02)     # rows are whole numbers
    elsewhere = planned("--mesh", "dp=4", "--experts-on", "dp")
    assert ("all_to_all", ["dp"]) in [(m["kind"], m["axes"]) for m in elsewhere["messages"]]


@pytest.mark.parametrize("argv, message", [
    (["--world", "4", "--mesh", "dp=3"], "multiply to 3, --world is 4"),
    (["--world", "3", "--mesh", "ep=3"], "ep splits 'expert' of 16 over ep=3"),
    (["--world", "16", "--mesh", "sp=16"], "sp=16 does not divide"),
    (["--documents", "3"], "must divide --seq-len 256"),
    (["--counts", "config.json"], "a row of 16 counts"),
    (["--counts", "nowhere.json"], "nowhere.json"),
    (["--counts", "broken.json"], "broken.json: not JSON"),
    (["--world", "0"], "--world 0: must be at least 1"),
    (["--packs", "0"], "--packs 0: must be at least 1"),
    (["--lora", "-1"], "--lora -1"),
    (["--overlap"], "--packs 1: --overlap takes two"),
    (["--mesh", "xy=2"], "'xy=2' is not one of replicate=N"),
    (["--world", "4", "--mesh", "dp=4", "--search"], "--search tries all meshes"),
])
def test_what_cannot_be_is_named(directory, argv, message):
    with open(f"{directory}/broken.json", "w") as file:
        file.write("[[1, 2")
    with contextlib.chdir(directory), pytest.raises(SystemExit, match=message) as said:
        plan.main([directory, *argv, "--seq-len", "256"])
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("text, message", [
    (None, "no such directory, and not a hub id"), ("{", "not JSON"), ('{"model_type": "mamba"}', "'mamba' is not"),
    ('{"model_type": "qwen3", "hidden_size": "wide"}', "hidden_size"),
])
def test_a_model_that_cannot_be_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit, match=message) as said:
        plan.main([str(tmp_path if text else tmp_path / "nowhere")])
    assert "\n" not in str(said.value)


def test_a_hub_id_is_its_config(monkeypatch, directory, capsys):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **more: asked.append((name, more["allow_patterns"])) or directory)
    plan.main(["org/model", "--seq-len", "64", "--json"])
    assert json.loads(capsys.readouterr().out)["model"] == "model" and asked == [("org/model", ["config.json"])]


@pytest.mark.slow
@pytest.mark.parametrize("seq_len", [4096, 65536])
def test_kimi_k2_on_1024_ranks(seq_len):
    """A trillion parameters within 8 GiB and 3 minutes of processor time."""
    argv = ["docs/configs/Kimi-K2-Instruct", "--world", "1024", "--mesh", "dp=32,ep=32", "--remat", "--json",
            "--seq-len", str(seq_len)]
    with subprocess.Popen([sys.executable, "-m", "xtf.plan", *argv], stdout=subprocess.PIPE, text=True) as process:
        out = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)                   # of this child alone
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0 and 1.02e12 < json.loads(out)["parameters"] < 1.04e12
    assert used.ru_maxrss < 8 * 2**20 and used.ru_utime + used.ru_stime < 180
