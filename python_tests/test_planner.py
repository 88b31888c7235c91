"""Micro-batches by tokens and by memory, and the retry on out-of-memory."""

from dataclasses import dataclass, replace

import pytest
import torch
from tiny_run import configure, write_inputs

from vcr1_fast.model import rollout as rollout_module
from vcr1_fast.ops.lm_head import rows_per_chunk
from vcr1_fast.train import loop, rollouts, setup
from vcr1_fast.train.groups import PolicyGroup, step_loss_config
from vcr1_fast.train.planner import Footprint, MicroBatch, Planner, is_out_of_memory
from vcr1_fast.train.sft import update as sft_update


@dataclass(frozen=True)
class Item:
    prompt_tokens: int
    lengths: tuple[int, ...]
    patches: int = 0

    def part(self, first, last):
        return replace(self, lengths=self.lengths[first:last])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def run(inputs, tmp_path, request):
    config = configure(*inputs, tmp_path / "run", "loss.beta=0", *getattr(request, "param", ()))
    with setup.open_run(config, reference=False) as run:
        yield run


def cut(planner, *items):
    """(schedule, items, lengths of each suffix) of each micro-batch."""
    return [
        (
            batch.schedule,
            [item.prompt_tokens for item in batch.items],
            [part.lengths for part in (batch.suffixes if batch.edges else batch.items)],
        )
        for batch in planner.parts(items)
    ]


def test_groups_are_packed_up_to_the_budget_in_order(run):
    planner = Planner(run.model, run.optimizer, 100)
    assert cut(planner, Item(40, (5, 5)), Item(30, (10, 10)), Item(20, (1,)), Item(70, (9,))) == [
        ("packed", [40, 30], [(5, 5), (10, 10)]),
        ("packed", [20, 70], [(1,), (9,)]),
    ]


def test_a_group_above_the_budget_runs_its_prompt_once(run):
    planner = Planner(run.model, run.optimizer, 100)
    assert cut(planner, Item(60, (15, 20, 10, 40)), Item(10, (10,)), Item(10, (10,))) == [
        ("split", [60], [(15, 20), (10,), (40,)]),
        ("packed", [10, 10], [(10,), (10,)]),
    ]
    # Prompt and one completion are above it, each alone is not.
    assert cut(planner, Item(90, (20, 30, 60))) == [("twice", [90], [(20, 30), (60,)])]
    # What is too long by itself still goes through, in passes as small as can be.
    assert cut(planner, Item(120, (20, 30))) == [("twice", [120], [(20,), (30,)])]
    assert cut(planner, Item(90, (20,))) == [("packed", [90], [(20,)])]
    assert [batch.tokens for batch in planner.parts([Item(60, (15, 20)), Item(90, (20, 30))])] == [
        95,
        90,
    ]


def test_the_smallest_schedule_is_known(run):
    """At which running out of memory is final."""
    item = Item(10, (3, 4))
    sizes = [
        MicroBatch([item]),
        MicroBatch([item], "split", (0, 1, 2)),
        MicroBatch([item], "twice", (0, 2)),
        MicroBatch([item], "twice", (0, 1, 2)),
        MicroBatch([item.part(0, 1)]),
        MicroBatch([item.part(0, 1)] * 2),
    ]
    assert [batch.is_smallest for batch in sizes] == [False, False, False, True, True, False]


def test_memory_bounds_micro_batches_too(run):
    free = Planner(run.model, run.optimizer, 10**9)
    items = [Item(100, (10,) * 8, patches=400)] * 4
    need = free.predict(MicroBatch(items[:1]))
    bounded = Planner(run.model, run.optimizer, 10**9, memory=1.01 * need)
    assert len(free.parts(items)) == 1
    assert len(bounded.parts(items)) == 4
    tight = Planner(run.model, run.optimizer, 10**9, memory=0.97 * need)
    batches = tight.parts(items)
    assert len(batches) == 4
    assert all(batch.schedule == "split" for batch in batches)
    assert all(tight.predict(batch) <= 0.97 * need for batch in batches)
    none = Planner(run.model, run.optimizer, 10**9, memory=0.2 * need)
    with pytest.raises(ValueError, match=r"prompt of 100 tokens \(400 patches.*GiB are free.*opt"):
        none.parts(items)


def test_memory_chooses_the_first_schedule_that_fits(run):
    """Just below the least that a schedule needs, the next one is taken; suffixes are as large as
    fit."""
    item = Item(400, (50,) * 6, patches=800)
    free = Planner(run.model, run.optimizer, 10**9)
    need = {
        (schedule, size): free.predict(MicroBatch([item], schedule, tuple(range(0, 7, size))))
        for schedule in ("split", "twice")
        for size in (1, 2, 3)
    }
    packed = free.predict(MicroBatch([item]))
    assert need["split", 1] < need["split", 3] < packed
    assert need["twice", 1] < need["split", 1]

    def chosen(memory):
        (batch,) = Planner(run.model, run.optimizer, 10**9, memory=memory).parts([item])
        return batch.schedule, len(batch.edges) - 1

    assert chosen(packed) == ("packed", -1)
    assert chosen(need["split", 3]) == ("split", 2)
    assert chosen(need["split", 3] - 1) == ("split", 3)
    assert chosen(need["split", 1]) == ("split", 6)
    assert chosen(need["split", 1] - 1)[0] == "twice"
    with pytest.raises(ValueError, match="prompt of 400 tokens"):
        chosen(need["twice", 1] - 1)


def test_memory_bounds_the_prompts_of_a_rollout(run):
    planner = Planner(run.model, run.optimizer, 1)
    lengths = [100, 300, 50, 80]
    need = [
        planner.footprint.rollout_bytes(lengths[:n], 8, 20, truncated=False) for n in range(1, 5)
    ]
    assert need == sorted(need)
    assert planner.prompts(lengths, 8, 20) == 4
    for fitting in (1, 2, 3):
        planner.memory = need[fitting - 1]
        assert planner.prompts(lengths, 8, 20) == fitting
    # Sorting for top-p takes as much again as drawing does.
    assert planner.prompts(lengths, 8, 20, truncated=True) < 3
    planner.memory = need[0] - 1
    with pytest.raises(ValueError, match=r"8 completions of up to 20 tokens for a prompt of 100"):
        planner.prompts(lengths, 8, 20)


def test_the_prediction_of_a_rollout_is_near_what_it_keeps(run, monkeypatch):
    memories = []

    class Kept(rollout_module.SharedPrefix):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            memories.append(self)

    monkeypatch.setattr(rollout_module, "SharedPrefix", Kept)
    samples = next(iter(run.batches()))[:3]
    settings = run.config.rollout
    rollouts.sample_group(run, samples, [None] * 3, settings.group_size, [0, 1, 2])
    pairs = [
        pair for memory in memories for pair in [*memory.prefix.values(), *memory._own.values()]
    ]
    kept = sum(x.nbytes for pair in pairs for x in pair)
    foot, lengths = run.planner.footprint, [len(sample.prompt) for sample in samples]
    rows = 3 * settings.group_size
    capacity = pairs[-1][0].shape[2]
    prefix = foot.per_cached * 3 * max(lengths)
    assert kept == pytest.approx(
        prefix + foot.per_cached * memories[0]._own[0][0].shape[0] * capacity
    )
    predicted = foot.rollout_bytes(lengths, settings.group_size, capacity, truncated=False)
    assert predicted > prefix + foot.per_cached * rows * capacity


def test_a_rollout_that_runs_out_of_memory_draws_the_same_by_halves(run, monkeypatch):
    samples = next(iter(run.batches()))[:3]
    reported = []
    run.planner.log = reported.append

    def sampled(most):
        def limited(prompts, count, sampling, generator, features):
            if len(prompts) > most:
                torch.rand(7, generator=generator[0])  # it runs out when some have been sampled
                raise MemoryError("no more")
            return rollout_module.rollout(
                run.model, run.processor, prompts, count, sampling, generator, vision=features
            )

        monkeypatch.setattr(run.sampler, "rollout", limited)
        return rollouts.sample_group(run, samples, [None] * 3, 4, [0, 1, 2])

    whole = sampled(3)
    assert not reported
    halves = sampled(1)
    assert reported == [
        f"out of memory with rollouts of {n} prompts: retrying by halves" for n in (3, 2)
    ]
    assert [one.texts for one in halves] == [one.texts for one in whole]
    with pytest.raises(MemoryError):
        sampled(0)


def test_the_prediction_counts_what_is_trained_and_kept(run, inputs, tmp_path):
    whole = Footprint.of(run.model)

    def footprint(name, *overrides):
        config = configure(*inputs, tmp_path / name, *overrides)
        return Footprint.of(setup.prepare_model(config, torch.device("cpu"))[0])

    frozen = footprint("a", "model.freeze_vision=true")
    assert frozen.per_patch == 0 < whole.per_patch
    assert frozen.per_token == whole.per_token
    recomputed = footprint("b", "model.gradient_checkpointing=true")
    assert recomputed.per_token < whole.per_token
    half = footprint("c", "model.dtype=bfloat16")
    assert 0.5 * whole.per_token < half.per_token < whole.per_token
    assert footprint("d", "model.lora_rank=2").fixed == 0 < whole.fixed


def test_the_prediction_knows_how_much_the_head_takes(run):
    hidden, weight = torch.zeros(10**6, 4), run.model.get_output_embeddings().weight
    assert weight.device.type == "cpu"
    chunk = rows_per_chunk(hidden, 2**17, 0) * 2**17 * 4
    assert chunk <= run.planner.footprint.head_chunk / 2


def saved_bytes(run, groups):
    """Bytes that autograd keeps of a pass over the groups, each storage once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loop.accumulate_gradients(run, groups, run.config.loss, on_policy=False)
    weights = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    return sum(size for where, (size, _) in kept.items() if where not in weights)


def groups_of(run, count=4):
    samples = next(iter(run.batches()))[:count]
    parts = rollouts.sample_completions(run, samples, 0, loop.Stopwatch())
    sampled = [one for chunk in parts for one in chunk.rollouts]
    groups = list(map(PolicyGroup.from_rollout, samples, sampled))
    return PolicyGroup.with_advantages(groups, torch.tensor([1.0, -1.0, 0.5, -0.5] * len(samples)))


def test_the_prediction_is_near_what_autograd_keeps(run):
    """It also counts what the backward pass itself needs, so it lies above."""
    groups = [one.with_vision(None) for one in groups_of(run)]
    run.planner.tokens = 10**6
    kept = saved_bytes(run, groups)
    foot = run.planner.footprint
    predicted = foot.bytes(
        sum(one.prompt_tokens + sum(one.lengths) for one in groups),
        0,
        sum(one.patches for one in groups),
    )
    assert kept < predicted - foot.fixed < 2.5 * kept


def settings_of(run, groups):
    """Counts of the whole, so that micro-batches are parts of one loss."""
    tokens = sum(sum(one.lengths) for one in groups)
    return step_loss_config(run.config.loss, 4 * len(groups), tokens)


def collect(run):
    grads = [p.grad.clone() for p in run.optimizer.parameters]
    run.optimizer.zero_grad()
    return grads


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_out_of_memory_halves_the_budget_and_keeps_the_gradient(run, monkeypatch, when):
    """In the second micro-batch, so that the first has left its gradient behind."""
    run.planner.tokens = 130
    groups = groups_of(run)
    fresh, settings = [one.with_vision(None) for one in groups], settings_of(run, groups)
    loop.accumulate_gradients(run, fresh, settings, on_policy=True)
    expected = collect(run)
    reported, calls, batches = [], [], []
    run.planner.log = reported.append
    right, right_pass = loop.policy_loss, loop.forward_backward

    def noted(run, batch, *args, **kwargs):
        batches.append((len(reported), batch))
        return right_pass(run, batch, *args, **kwargs)

    def failing(model, part, *args, **kwargs):
        calls.append(part)
        loss, metrics = right(model, part, *args, **kwargs)
        if len(calls) == 2:
            error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
            if when == "forward":
                raise error
            run.model.get_input_embeddings().weight.register_hook(fail_once(error))
        return loss, metrics

    def fail_once(error):
        def hook(gradient):
            if len(calls) == 2:
                raise error

        return hook

    monkeypatch.setattr(loop, "policy_loss", failing)
    monkeypatch.setattr(loop, "forward_backward", noted)
    loop.accumulate_gradients(run, groups, settings, on_policy=True)
    for ours, theirs in zip(collect(run), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    first, second = ([one for retry, one in batches if retry == n] for n in (0, 1))
    largest = max(batch.tokens for batch in first)
    assert largest // 2 <= run.planner.tokens <= 65
    assert max(batch.tokens for batch in second) < largest
    # What is too long by itself still goes through, in the smallest passes there are.
    assert all(batch.is_smallest or batch.tokens <= run.planner.tokens for batch in second)
    assert len(reported) == 1 and "20 MiB" in reported[0]


def test_other_errors_are_not_taken_for_it(run, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(loop, "policy_loss", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        loop.accumulate_gradients(run, groups_of(run), run.config.loss, on_policy=True)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))


def test_memory_that_never_suffices_is_told(run, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "policy_loss", fail)
    with pytest.raises(ValueError, match="one completion at a time"):
        loop.accumulate_gradients(run, groups_of(run), run.config.loss, on_policy=True)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_fine_tuning_survives_it_too(run, monkeypatch, error):
    from vcr1_fast.train import sft

    samples = next(iter(run.batches()))
    groups = [
        sft.Group(one.prompt, [run.processor.completion(sft.right_answer(one.record))])
        for one in samples
    ]
    run.planner.tokens = 200
    monkeypatch.setattr(sft, "clipped_step", lambda *args, **options: 0.0)
    reported = []
    run.planner.log = reported.append
    expected_loss = sft_update(run, groups, 0.0)["loss"]
    expected = collect(run)
    right, calls = sft.completion_logps, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return right(*args, **kwargs)

    monkeypatch.setattr(sft, "completion_logps", failing)
    assert sft_update(run, groups, 0.0)["loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert len(reported) == 1 and (str(error) or "MemoryError") in reported[0]
    for ours, theirs in zip(collect(run), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_bytes_of_split_and_twice_by_hand():
    """a = 10, p = 2, c = 3, g = 6, 50 fixed; P = 100, S_m = 20 with 20 labels of 4, 30 patches."""
    foot = Footprint(
        per_token=10.0,
        per_label=4.0,
        per_patch=2.0,
        fixed=50.0,
        head_chunk=1000.0,
        per_cached=3.0,
        per_cached_gradient=6.0,
        per_copied=0.0,
        per_read=0.0,
        vocabulary=2,
        recomputed=False,
    )
    split = 50 + 80 + 10 * (100 + 20) + 2 * 30 + 6 * 100
    assert foot.suffix_bytes("split", 100, 20, 20, 30) == split
    again = 50 + 10 * 100 + 2 * 30 + 6 * 100
    assert foot.suffix_bytes("twice", 100, 20, 20, 30) == again
    # A long suffix takes more than the prompt: its graph beside the prompt's keys and their sums.
    suffixes = 50 + 1000 + 10 * 400 + (3 + 6) * 100
    assert foot.suffix_bytes("twice", 100, 400, 400, 30) == suffixes
    kept = replace(foot, recomputed=True)
    assert kept.suffix_bytes("split", 100, 20, 20, 30) == split + 3 * 100
    assert kept.suffix_bytes("twice", 100, 20, 20, 30) == again + 3 * 100
    assert kept.suffix_bytes("twice", 100, 400, 400, 30) == suffixes
    copying = replace(foot, per_copied=1.0)
    assert copying.suffix_bytes("split", 100, 20, 20, 30) == split + 120
    recurrent = replace(foot, per_state=7.0)
    assert recurrent.suffix_bytes("split", 100, 20, 20, 30) == split + 14
