"""The set-up of a run, GRPO or SFT: process, model, data, log; resumed from a checkpoint."""

import copy
import os
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor, nn

from vcr1_fast.config.loader import dump_config
from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.data.requests import clip_key
from vcr1_fast.engines.open import open_sampler
from vcr1_fast.engines.sampler import OwnSampler, Sampler
from vcr1_fast.files import read_jsonl, read_lines
from vcr1_fast.model.attention import prepare_attention
from vcr1_fast.model.checkpoint import load, policy_weights, save, save_adapter
from vcr1_fast.model.family import family_of
from vcr1_fast.model.forward import prompt_features
from vcr1_fast.model.processor import Processor
from vcr1_fast.model.staging import staging
from vcr1_fast.model.vision import freeze_vision, vision_is_frozen
from vcr1_fast.model.wrapping import checkpoint_activations, unwrap
from vcr1_fast.ops.memory import available_bytes
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.prompt_template import prompts_from
from vcr1_fast.train import as_trained
from vcr1_fast.train.advantages import TaskScales
from vcr1_fast.train.ahead import Ahead
from vcr1_fast.train.checkpoint import (
    DamagedCheckpoint,
    check_checkpoint,
    check_space,
    checkpoints,
    load_checkpoint,
    load_trained_state,
    save_checkpoint,
    trained_state,
)
from vcr1_fast.train.config import ModelConfig, TrainConfig
from vcr1_fast.train.dataset import (
    ByteCache,
    PromptSource,
    Sample,
    training_records,
)
from vcr1_fast.train.difficulty import select
from vcr1_fast.train.health import Health
from vcr1_fast.train.log import RunLog
from vcr1_fast.train.optim import MasterAdamW
from vcr1_fast.train.plan import Needs, data_lines, model_lines
from vcr1_fast.train.planner import GIB, Footprint, Planner
from vcr1_fast.train.ranks import Peers, as_launched, open_mesh, open_ranks, shards_model
from vcr1_fast.train.resume import check_same_run, flat_settings, identity, keep_settings
from vcr1_fast.train.sharding import Sharding, Traffic
from vcr1_fast.train.stopping import RunStopped, StopRequest, locked
from vcr1_fast.train.trackers import check_installed, installed_default
from vcr1_fast.train.validation import Validation


@dataclass(eq=False)
class Run:
    """The parts of a run.

    done: steps already taken; features: cache of a frozen vision encoder's outputs, (vision tokens,
    H) on the CPU; reference_model: the frozen copy for the KL term, None under LoRA (the adapters
    are disabled instead) and without a KL term.
    """

    config: TrainConfig
    accelerator: Accelerator
    model: nn.Module
    processor: Processor
    reference_model: nn.Module | None
    optimizer: MasterAdamW
    source: PromptSource
    planner: Planner
    features: ByteCache[Tensor]
    log: RunLog
    done: int
    scales: TaskScales
    """Running spread of each task's rewards, for `advantage.scale: task_ema`."""
    health: Health
    stop: StopRequest
    identity: dict[str, Any]
    sharding: Sharding | None
    reference_sharding: Sharding | None
    traffic: Traffic
    sampler: Sampler
    ahead: Ahead | None = None
    """Where the next step is sampled during this one's update."""
    validation: Validation | None = None
    used: int = 0
    """Samples trained on since `done`, on all ranks."""

    def __post_init__(self) -> None:
        self._completed = self._saved = self.done
        self._moments = dict(self.scales.moments)

    @property
    def tasks(self) -> list[str]:
        """Task of each record."""
        return [record.task for record in self.source.records]

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def ranks(self) -> int:
        return self.accelerator.num_processes

    def batches(self) -> Iterator[list[Sample]]:
        """This rank's samples of each remaining step; none after an early stop."""
        optim, validation = self.config.optim, self.validation
        if validation is not None and self.done == 0:  # what training starts from
            self.log.step({"step": 0, **self.validate(0)})
        if self.stops_early():
            return
        steps = self.source.batches(
            self.done, optim.steps, optim.prompts_per_step, self.rank, self.ranks
        )
        for samples in steps if self.ahead is None else self.ahead.batches(steps):
            yield samples
            if self.stops_early():
                return

    def stops_early(self) -> bool:
        """Whether evaluations have not become better for `run.patience` of them; says so."""
        validation, step = self.validation, self._completed
        if validation is None or not validation.gives_up(step) or step == self.config.optim.steps:
            return False
        best = validation.best
        assert best is not None  # nothing else is stale
        self.log.message(
            f"stopped after step {step}: {best.metric} has not risen above {best.value:.4g}, of "
            f"step {best.step}, in {validation.stale(step)} evaluations (run.patience)"
        )
        return True

    def validate(self, step: int) -> dict[str, float]:
        """Metrics of the evaluation after `step` steps, where one is due; the best model is kept.

        All ranks call this.
        """
        if self.validation is None or not self.validation.is_due(step):
            return {}
        self.gather()
        metrics = self.validation.evaluate(self)
        self.validation.keep_best(self, step, metrics)
        return metrics

    def gather(self) -> None:
        """Make the weights whole for passes of the model, where they are sharded; the next
        optimiser step shards them again. All ranks call it together."""
        if self.sharding is not None:
            self.sharding.gather()

    @property
    def vision_is_frozen(self) -> bool:
        """Whether rollout, policy and reference model share a clip's features."""
        return vision_is_frozen(self.model)

    def clip_features(
        self, samples: Sequence[Sample], *, with_graph: bool = False
    ) -> list[Tensor | None]:
        """Features of each sample's clips, None for a sample without clips; a frozen encoder's come
        from the cache where it holds them. `with_graph`: keep the graph for a backward pass."""
        keys = [clip_key(sample.record) for sample in samples]
        known = [self.features.get(key) for key in keys]
        with torch.set_grad_enabled(with_graph):
            found = prompt_features(unwrap(self.model), [s.prompt for s in samples], known)
        if self.vision_is_frozen:
            for key, cached, new in zip(keys, known, found, strict=True):
                if cached is None and new is not None:
                    self.features.put(key, new.to("cpu", copy=True))
        return found

    def sync_sampler(self, version: int) -> None:
        """Bring the engine's weights up to those after `version` steps, where they are others."""
        if self.sampler.version == version:
            return
        if self.rank == 0 or not self.sampler.shared:
            self.sampler.sync(policy_weights(self.model), version)
        else:  # the first process sends the weights, which are whole on all of them
            self.sampler.version = version
        self.accelerator.wait_for_everyone()

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The model as it was before training. All ranks enter together."""
        if self.reference_model is not None:
            with (
                nullcontext()
                if self.reference_sharding is None
                else (self.reference_sharding.gathered())
            ):
                yield self.reference_model
        elif self.config.model.adapter is not None:
            model: Any = self.model
            model.set_adapter("reference")
            try:
                yield model
            finally:
                model.set_adapter("default")
        else:
            adapted: Any = self.model  # a PeftModel, whose type peft need not be installed for
            with adapted.disable_adapter():
                yield self.model

    def missing(self, samples: Sequence[Sample]) -> int:
        """Samples missing from this step's batches on all ranks, because they are quarantined."""
        present = sum(gather_object([len(samples)]))
        self.used += present
        return self.config.optim.prompts_per_step - present

    def log_step(self, row: dict[str, Any]) -> None:
        """Write a step's row, with what the run knows of it: the place in the data, the clock, the
        memory, and whether it is healthy. ValueError after too many skipped updates in a row."""
        step = row["step"]
        row = row | {
            "epoch": step * self.config.optim.prompts_per_step / len(self.source.records),
            "time": round(time.time(), 3),
            "memory_gib": peak_gib(self.accelerator.device),
        }
        self.log.step(row | self.health.check(step, row))

    def finish_step(self, step: int) -> None:
        """Write the checkpoint after `step` steps, if one is due.

        ValueError where every sample so far was quarantined: nothing was trained. RunStopped, after
        the checkpoint, where a signal asked any rank to stop.
        """
        config = self.config
        self._completed, self._moments = step, dict(self.scales.moments)
        every = config.run.save_every
        due = step == config.optim.steps or bool(every and step % every == 0)
        # An early stop ends the run here.
        due = due or (self.validation is not None and self.validation.gives_up(step))
        if due and not (self.done or self.used):
            raise ValueError(
                f"no sample of {step} steps could be used: see "
                f"{Path(config.run.output) / 'quarantine.jsonl'}"
            )
        # A signal may reach one rank only; all must save and end together.
        number = max(gather_object([self.stop.number or 0]))
        if due or number:
            self._save()
        if number and step < config.optim.steps:
            raise RunStopped(number, step, Path(config.run.output))

    def check_overdue(self) -> None:
        """Between micro-batches: RunStopped, after a checkpoint of the last completed step, where
        a signal's grace has run out. Call it only while the step has not changed the weights.

        Several ranks finish the step: one that left would leave the others in a collective.
        """
        if self.ranks == 1 and self.stop.is_overdue and self.stop.number is not None:
            if self._completed > self._saved:
                self._save()
            raise RunStopped(self.stop.number, self._completed, Path(self.config.run.output))

    def _save(self) -> None:
        config, step = self.config, self._completed
        if self.sharding is None:
            weights = {
                "model": trained_state(self.model),
                "optimizer": self.optimizer.state_dict(),
            }
        else:
            weights = self.optimizer.sharded_state()
        save_checkpoint(
            Path(config.run.output) / "checkpoints",
            {
                "step": step,
                "identity": self.identity,
                "settings": dump_config(config),
                "scales": self._moments,
                **weights,
            },
            keep=config.run.keep_checkpoints,
            rank=self.rank,
            barrier=self.accelerator.wait_for_everyone,
            gather=gather_object,
            shards=None if self.sharding is None else self.optimizer.named_shards(),
        )
        self._saved = step

    def export(self) -> Path:
        """Write the trained model, adapters merged, in the Hugging Face layout; its folder. The
        adapters alone go to `adapter` beside it."""
        output = Path(self.config.run.output)
        path = output / "model"
        self.gather()
        if self.rank == 0:
            others = as_trained.files(self.config, self.identity, self._completed)
            save(self.model, self.processor, path, others=others)
            if self.config.model.has_adapters:
                base = self.config.model.path
                save_adapter(self.model, output / "adapter", base=base, others=others)
            listed = output / "quarantine.jsonl"
            if count := len(list(read_lines(listed))) if listed.exists() else 0:
                self.log.message(
                    f"{count} records were left out, with the reason of each: {listed}"
                )
            self.log.message(
                f"next: vcr1 report {output}; vcr1 eval --model {output} --data TEST.jsonl "
                f"--output {output / 'eval'}"
            )
        self.accelerator.wait_for_everyone()
        return path


def peak_gib(device: torch.device) -> float:
    """GiB that tensors took at most on a GPU since the last call; on a CPU, those that the process
    has taken at most."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / GIB
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


@contextmanager
def open_run(config: TrainConfig, *, reference: bool, kind: str = "grpo") -> Iterator[Run]:
    """Open a run of a kind ("grpo" or "sft"), resumed where its folder holds a checkpoint.

    `reference`: whether the loss has a KL term to the untrained model. ValueError names the
    setting, file or run in the way.
    """
    accelerator = open_ranks(config.run)
    config = replace(config, run=as_launched(config.run, accelerator))
    set_seed(config.run.seed)
    output = Path(config.run.output)
    main = accelerator.is_main_process
    with ExitStack() as stack:
        # First of all: an error of one rank, from here on, ends the others too.
        stack.enter_context(Peers(accelerator.process_index, accelerator.num_processes))
        # Before anything is read: another run may be writing checkpoints here.
        if main:
            stack.enter_context(locked(output))
        named = config.run.trackers
        names: Sequence[str] = installed_default() if named is None else named
        if main:  # before weights are loaded, which takes minutes
            check_installed(names)
        found, leftovers = checkpoints(output / "checkpoints")
        if main and not config.run.resume and (found or (output / "metrics.jsonl").exists()):
            raise ValueError(f"{output} holds a run already: resume it, or name another folder")
        # Every rank sees all bad rows, so rank 0 lists them; a bad clip is listed by the rank that
        # decodes it.
        listed = output / "quarantine.jsonl"
        quarantine = Quarantine(listed if main else None)
        chosen = select(training_records(config.data, quarantine), config.data, config.run.seed)
        config = config.with_steps(len(chosen.records))
        is_sharded = shards_model(config.run, accelerator.num_processes)
        if is_sharded and config.rollout.decoding == "graphs":
            raise ValueError(
                "rollout.decoding=graphs cannot record the hooks of a sharded model: take static, "
                "or run.parallel=ddp"
            )
        # To be sharded, it is loaded to main memory: the device may not hold all of it.
        model, processor = prepare_model(
            config, accelerator.device, torch.device("cpu") if is_sharded else None
        )
        # Of the base weights, so before a checkpoint is loaded.
        own = identity(kind, chosen.records, chosen.sampler.name, model)
        reference_model = None
        if reference and config.model.adapter is not None:
            # The run starts from base and adapter together, so the KL term needs both as they were.
            add_adapter(model, config.model, "reference")
        elif reference and not config.model.has_adapters:
            # Copied before a checkpoint is loaded: the reference is the untrained model.
            reference_model = copy.deepcopy(model).requires_grad_(False)
        # Before it is sharded, when dtype and sizes are those of the passes.
        footprint = Footprint.of(model)
        machine = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        needs = Needs.of(model, config, accelerator.num_processes, machine)
        traffic = Traffic()
        sharding = reference_sharding = None
        if is_sharded:
            mesh = open_mesh(config.run, accelerator)
            sharding = Sharding(model, mesh, traffic, config.run.cpu_offload)
            if reference_model is not None:
                reference_sharding = Sharding(
                    reference_model, mesh, traffic, config.run.cpu_offload
                )
        optimizer = MasterAdamW(
            model.parameters(), config.optim, sharding=sharding, traffic=traffic
        )
        stack.callback(optimizer.close)
        scales = TaskScales(config.advantage.ema_decay, config.advantage.ema_floor)
        start = None
        if config.run.resume_from is not None:
            start = named_checkpoint(Path(config.run.resume_from), output, found)
        notes = [f"removed {path}: an interrupted write left it incomplete" for path in leftovers]
        notes += chosen.notes
        done = 0
        starts = found or ([] if start is None else [start])
        if config.run.resume and starts:
            path, damaged = newest_intact(starts, accelerator)
            notes += [f"ignoring {reason}" for reason in damaged]
            state = load_checkpoint(path, rank=accelerator.process_index, whole=sharding is None)
            # Before anything is loaded: a refusal leaves the folder as it was.
            changed = check_same_run(path, state, config, own)
            if "model" in state:
                # Before the optimiser: in a float32 run the parameters are its masters.
                load_trained_state(model, state["model"])
                optimizer.load_state_dict(state["optimizer"])
            else:
                optimizer.load_sharded(path, state)
            scales.load(state["scales"])
            done = state["step"]
            if path in found:
                # A kill between a checkpoint and the removal of older ones left these.
                older = found[: found.index(path) + 1][: -config.run.keep_checkpoints]
                leftovers = [*leftovers, *older]
            notes += [f"resuming after step {done} from {path}", *changed]
            del state  # several times the size of the model
        stack.enter_context(prompts_from(config.data.prompts, TASKS, think=config.data.think))
        log = stack.enter_context(
            RunLog(
                output,
                config.optim.steps,
                done,
                trackers=names,
                settings=flat_settings(dump_config(config)),
                active=main,
            )
        )
        if main:
            remove_leftovers(output, leftovers)
            keep_settings(output, config, done)
            # A checkpoint holds trained weights, masters and two moments, at least in float32.
            trained = sum(p.numel() for p in optimizer.parameters)
            check_space(output, 12 * trained + sum(p.nbytes for p in optimizer.parameters))
        validation = None
        if config.data.val is not None:
            validation = Validation(config, config.data.val, done)
            notes += validation.notes
        for note in notes:
            log.message(note)
        for line in data_lines(config, chosen.records, len(quarantine), grpo=kind == "grpo"):
            log.message(line)
        free = available_bytes(accelerator.device)
        for line in model_lines(needs, config, free):
            log.message(line)
        for item in quarantine.items:
            log.message(f"quarantined {item.record_id or item.source}: {item.reason}")
        # Ranks other than 0 append to the list, which rank 0 has begun by now.
        accelerator.wait_for_everyone()
        if not main:
            quarantine = Quarantine(listed)
        # From here on each rank reports the clips that it decodes itself.
        quarantine.log = partial(log.message, every_rank=True)
        stage = staging(model, processor, config.data.resized_by)
        log.message(f"frames are resized by {'workers' if stage is None else stage.device}")
        source = stack.enter_context(
            PromptSource(
                chosen.records, processor, config.data, quarantine, chosen.sampler, stage=stage
            )
        )
        planner = Planner(
            model,
            optimizer,
            config.optim.tokens_per_microbatch,
            memory=config.optim.memory_gib and config.optim.memory_gib * GIB,
            log=log.message,
        )
        planner.footprint = footprint
        sampler: Sampler = OwnSampler(model, processor)
        if kind == "grpo":
            sampler = stack.enter_context(
                open_sampler(
                    config.rollout,
                    config.model.path,
                    model,
                    processor,
                    temperature=config.rollout.temperature,
                    processes=accelerator.num_processes,
                )
            )
            log.message(f"completions by {sampler.describe()}")
        health = Health(config.optim.max_skipped_updates, log.message)
        rows = Path(config.run.output, "metrics.jsonl")
        if done and rows.exists():  # not where the run branches off another one
            # Cut to `done` by rank 0, before the barrier above.
            health.replay(row for _, row in read_jsonl(rows))
        ahead = Ahead() if kind == "grpo" and config.rollout.ahead else None
        if ahead is not None:
            stack.callback(ahead.close)
        yield Run(
            config=config,
            accelerator=accelerator,
            model=model,
            processor=processor,
            reference_model=reference_model,
            optimizer=optimizer,
            source=source,
            planner=planner,
            features=ByteCache(config.model.vision_cache_mb * 2**20, lambda f: f.nbytes),
            log=log,
            done=done,
            scales=scales,
            health=health,
            stop=stack.enter_context(StopRequest(config.run.stop_grace)),
            identity=own,
            sharding=sharding,
            reference_sharding=reference_sharding,
            traffic=traffic,
            sampler=sampler,
            ahead=ahead,
            validation=validation,
        )


def newest_intact(found: list[Path], accelerator: Accelerator) -> tuple[Path, list[str]]:
    """The newest checkpoint whose files match their checksums, and why newer ones do not.

    DamagedCheckpoint where none does. Rank 0 reads the files, the others take its word.
    """
    damaged: list[str] = []
    answer: list[Any] = [None, damaged]
    if accelerator.is_main_process:
        for path in reversed(found):
            try:
                check_checkpoint(path)
            except (OSError, ValueError) as error:
                damaged.append(f"{error}")
            else:
                answer[0] = path
                break
    # All ranks must resume from the same checkpoint, whatever each would read.
    path, damaged = broadcast_object_list(answer)
    if path is None:
        raise DamagedCheckpoint("; ".join(damaged))
    return path, damaged


def named_checkpoint(path: Path, output: Path, found: list[Path]) -> Path | None:
    """The checkpoint of `run.resume_from`, None where the run itself has newer ones to go on
    from. ValueError for a folder that is no checkpoint, or one of this run's that is not its
    newest: steps after it would be lost."""
    if path.resolve().parent == (output / "checkpoints").resolve():
        if found and path.resolve() != found[-1].resolve():
            raise ValueError(
                f"run.resume_from: {path} is not the newest checkpoint of {output}, "
                f"{found[-1].name} is: name another run.output to branch off"
            )
    elif found:
        return None
    if not (path / "manifest.json").is_file():
        raise ValueError(f"run.resume_from: {path} is no checkpoint (a folder step-N of a run)")
    return path


def remove_leftovers(output: Path, leftovers: list[Path]) -> None:
    """Remove what killed runs left: partial checkpoints, unfinished exports, files that were never
    renamed. Call it under the lock of the folder."""
    # Folders of exports, and `files.replacing`'s names of files: .<stem>.<process><suffix>.
    found = set(leftovers)  # a name may match two patterns
    for pattern in (".model.*", ".adapter.*", ".best.*", ".*.[0-9]*"):
        found.update(output.glob(pattern))
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def prepare_model(
    config: TrainConfig, device: torch.device, weights_on: torch.device | None = None
) -> tuple[nn.Module, Processor]:
    """The model to train on `device`, with adapters if `model.lora_rank` is set, and its processor;
    its weights stay on `weights_on` where that is given. ValueError for an attention backend
    without a backward pass on `device`."""
    settings, frames = config.model, config.data.frames
    if settings.attention == "flex" and device.type != "cuda":
        raise ValueError(
            f"model.attention=flex has a backward pass on CUDA alone, training is on {device}: "
            "leave it at auto"
        )
    model, processor = load(
        settings.path,
        dtype=settings.dtype,
        device=weights_on or device,
        mrope=settings.mrope,
        video_text=settings.video_text,
    )
    processor = processor.with_frames(frames, media_first=config.data.media_first)
    prepare_attention(model, settings.attention)
    if settings.adapter is not None:
        model = add_adapter(model, settings, "default")
    elif settings.lora_rank:
        model = add_adapters(model, settings)
    if settings.freeze_vision:
        freeze_vision(model)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    return model.train(), processor


def add_adapters(model: nn.Module, settings: ModelConfig) -> nn.Module:
    """The model with low-rank adapters (peft), its only trained parameters. No dropout: rollout and
    training forward must be the same network."""
    from peft import LoraConfig, get_peft_model

    family = family_of(model)
    targets = list(settings.lora_targets or family.lora_targets)
    scale: Any = settings.lora_alpha  # peft divides by the rank, and annotates int
    adapters = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=scale,
        lora_dropout=0.0,
        target_modules=targets,
        exclude_modules=family.vision_pattern if settings.freeze_vision else None,
    )
    try:
        with warnings.catch_warnings():
            # peft asks transformers 5.23 for a property by its former name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            return get_peft_model(model, adapters)
    except ValueError as error:
        raise ValueError(f"model.lora_targets {targets}: {error}") from error


def add_adapter(model: Any, settings: ModelConfig, name: str) -> nn.Module:
    """The model with the adapter of `settings.adapter` under a name: "default", which is trained,
    or one more that is not. ValueError names a folder without one, or one that does not fit."""
    from peft import PeftConfig, PeftModel

    folder = Path(settings.adapter or "")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise ValueError(f"model.adapter: {folder / file} is missing")
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name)
            return model
        adapter = PeftConfig.from_pretrained(str(folder))
        # Rollout and training forward must be the same network, as in `add_adapters`.
        adapter.lora_dropout = 0.0
        adapter.inference_mode = False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            # peft only warns of weights that the file lacks, and trains random ones.
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, folder, name, config=adapter, is_trainable=True)
    except (ValueError, RuntimeError, KeyError, UserWarning) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"model.adapter {folder} does not fit {settings.path}: {line}") from error
