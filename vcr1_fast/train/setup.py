"""What both kinds of training begin with: process, model, data and log, resumed where there is a
checkpoint to resume from."""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from torch import nn

from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.data.requests import clip_key
from vcr1_fast.model.attention import prepare_attention
from vcr1_fast.model.checkpoint import load, save
from vcr1_fast.model.forward import prompt_features
from vcr1_fast.model.processor import Processor
from vcr1_fast.model.vision import freeze_vision
from vcr1_fast.model.wrapping import checkpoint_activations, unwrap
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.prompt_template import prompts_from
from vcr1_fast.train.build import dump_config
from vcr1_fast.train.checkpoint import (
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
    Sampler,
    training_records,
)
from vcr1_fast.train.difficulty import select
from vcr1_fast.train.log import RunLog
from vcr1_fast.train.optim import MasterAdamW
from vcr1_fast.train.planner import GIB, Planner
from vcr1_fast.train.scales import TaskScales

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass(eq=False)
class Run:
    """The parts of a run. `done`: steps behind it; `features`: of clips that a frozen tower has
    encoded, (video tokens, H) on the CPU; `anchor`: the frozen copy of the model that the
    KL term refers to, None where adapters are switched off instead, or nothing refers to one."""

    config: TrainConfig
    accelerator: Accelerator
    model: nn.Module
    processor: Processor
    anchor: nn.Module | None
    optimizer: MasterAdamW
    source: PromptSource
    planner: Planner
    features: ByteCache[torch.Tensor]
    log: RunLog
    done: int
    used: int = 0
    """Samples trained on since then, in all processes."""
    scales: TaskScales = field(default_factory=TaskScales)
    """Spread of each task's rewards so far, where advantages are divided by it."""

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def ranks(self) -> int:
        return self.accelerator.num_processes

    def batches(self) -> Iterator[list]:
        """This process's samples of each step still to do."""
        optim = self.config.optim
        return self.source.batches(
            self.done, optim.steps, optim.prompts_per_step, self.rank, self.ranks
        )

    @property
    def vision_is_frozen(self) -> bool:
        """Whether a clip's features are the same for rollout, policy and reference."""
        visual = unwrap(self.model).model.visual
        return not any(parameter.requires_grad for parameter in visual.parameters())

    def clip_features(self, samples: list[Sample], *, with_graph: bool = False) -> list:
        """Features of each sample's clips, or None where it has none; those of a frozen tower are
        taken from the cache where it has them. `with_graph`: for a backward pass through it."""
        keys = [clip_key(sample.record) for sample in samples]
        known = [self.features.get(key) for key in keys]
        with torch.set_grad_enabled(with_graph):
            found = prompt_features(unwrap(self.model), [s.prompt for s in samples], known)
        if self.vision_is_frozen:
            for key, cached, new in zip(keys, known, found, strict=True):
                if cached is None and new is not None:
                    self.features.put(key, new.to("cpu", copy=True))
        return found

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The model as it was before training."""
        if self.anchor is not None:
            yield self.anchor
        else:
            with self.model.disable_adapter():
                yield self.model

    def missing(self, samples: list) -> int:
        """Samples that are not in this step's batches because they are bad, in all processes."""
        present = sum(gather_object([len(samples)]))
        self.used += present
        return self.config.optim.prompts_per_step - present

    def finish_step(self, step: int) -> None:
        """Write the checkpoint of `step` steps done, where one is due. ValueError where every
        sample was bad so far: it would be a checkpoint of nothing."""
        config = self.config
        every = config.run.save_every
        if step == config.optim.steps or (every and step % every == 0):
            if not (self.done or self.used):
                raise ValueError(
                    f"no sample of {step} steps could be used: see "
                    f"{Path(config.run.output) / 'quarantine.jsonl'}"
                )
            save_checkpoint(
                Path(config.run.output) / "checkpoints",
                {
                    "step": step,
                    "place": step * config.optim.prompts_per_step,
                    "seed": config.run.seed,
                    "records": len(self.source.records),
                    "order": self.source.sampler.name,
                    "model": trained_state(self.model),
                    "optimizer": self.optimizer.state_dict(),
                    "scales": self.scales.moments,
                },
                keep=config.run.keep_checkpoints,
                rank=self.rank,
                barrier=self.accelerator.wait_for_everyone,
            )

    def export(self) -> Path:
        """Write the trained model, adapters added in, in the Hugging Face layout; its folder."""
        path = Path(self.config.run.output) / "model"
        if self.rank == 0:
            save(self.model, self.processor, path)
        self.accelerator.wait_for_everyone()
        return path


@contextmanager
def open_run(config: TrainConfig, *, reference: bool) -> Iterator[Run]:
    """Everything a run needs; `reference`: whether the loss refers to the untrained model."""
    accelerator = Accelerator(cpu=config.run.device == "cpu")
    if accelerator.distributed_type in _SHARDED:
        raise ValueError(
            f"accelerate was told to use {accelerator.distributed_type.value}, but every process "
            "holds the whole model here: launch with --multi_gpu"
        )
    set_seed(config.run.seed)
    output = Path(config.run.output)
    main = accelerator.is_main_process
    found, broken = checkpoints(output / "checkpoints")
    if main and not config.run.resume and (found or (output / "metrics.jsonl").exists()):
        raise ValueError(f"{output} holds a run already: resume it, or name another folder")
    # Bad rows are seen by every process and listed by the first; bad clips by who meets them.
    listed = output / "quarantine.jsonl"
    quarantine = Quarantine(listed if main else None)
    chosen = select(training_records(config.data, quarantine), config.data, config.run.seed)
    model, processor = prepare_model(config, accelerator.device)
    anchor = None
    if reference and not config.model.lora_rank:
        anchor = copy.deepcopy(model).requires_grad_(False)
    optimizer = MasterAdamW(model.parameters(), config.optim)
    scales = TaskScales(config.advantage.ema_decay, config.advantage.ema_floor)
    done = 0
    if config.run.resume and found:
        state = load_checkpoint(found[-1], rank=accelerator.process_index)
        check_same_run(found[-1], state, config, chosen.sampler)
        load_trained_state(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scales.load(state.get("scales", {}))
        done = state["step"]
        del state  # several times the size of the model
    with ExitStack() as stack:
        stack.callback(optimizer.close)
        stack.enter_context(prompts_from(config.data.prompts, TASKS, think=config.data.think))
        log = stack.enter_context(
            RunLog(
                output,
                config.optim.steps,
                done,
                tensorboard=config.run.tensorboard,
                active=main,
            )
        )
        for path in broken:
            log.message(f"ignoring {path}: an interrupted write left it incomplete")
        if done:
            log.message(f"resuming after step {done} from {found[-1]}")
        if main:
            (output / "config.yaml").write_text(dump_config(config))
        for item in quarantine.items:
            log.message(f"quarantined {item.record_id or item.source}: {item.reason}")
        for note in chosen.notes:
            log.message(note)
        accelerator.wait_for_everyone()
        if not main:
            quarantine = Quarantine(listed)
        source = stack.enter_context(
            PromptSource(chosen.records, processor, config.data, quarantine, chosen.sampler)
        )
        planner = Planner(
            model,
            optimizer,
            config.optim.tokens_per_microbatch,
            memory=config.optim.memory_gib and config.optim.memory_gib * GIB,
            tell=log.message,
        )
        features = ByteCache[torch.Tensor](config.model.vision_cache_mb * 2**20, lambda f: f.nbytes)
        yield Run(
            config,
            accelerator,
            model,
            processor,
            anchor,
            optimizer,
            source,
            planner,
            features,
            log,
            done,
            scales=scales,
        )


def prepare_model(config: TrainConfig, device: torch.device) -> tuple[nn.Module, Processor]:
    """The model to train, with adapters where they are asked for, and its processor. ValueError for
    attention without a backward pass on `device`."""
    settings, frames = config.model, config.data.frames
    if settings.attention == "flex" and device.type != "cuda":
        raise ValueError(
            f"model.attention=flex has a backward pass on CUDA alone, training is on {device}: "
            "leave it at auto"
        )
    model, processor = load(settings.path, dtype=settings.dtype, device=device)
    processor = processor.with_frames(frames, media_first=config.data.media_first)
    prepare_attention(model, settings.attention)
    if settings.lora_rank:
        model = add_adapters(model, settings)
    if settings.freeze_vision:
        freeze_vision(model)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    return model.train(), processor


def add_adapters(model: nn.Module, settings: ModelConfig) -> nn.Module:
    """The model with low-rank adapters (peft); only they are trained. Without dropout, so that the
    rollout and the training forward see the same network."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(settings.lora_targets),
        exclude_modules=r".*\bvisual\b.*" if settings.freeze_vision else None,
    )
    try:
        with warnings.catch_warnings():
            # peft asks transformers 5.23 for a property by its former name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            return get_peft_model(model, adapters)
    except ValueError as error:
        raise ValueError(f"model.lora_targets {list(settings.lora_targets)}: {error}") from error


def check_same_run(
    path: Path, state: dict[str, Any], config: TrainConfig, sampler: Sampler
) -> None:
    """ValueError where the checkpoint's state cannot be gone on from: the data would go on
    elsewhere, or it is past the last step."""
    place = state["step"] * config.optim.prompts_per_step
    for name, saved, given in (
        ("run.seed", state["seed"], config.run.seed),
        ("optim.prompts_per_step", state["place"], place),
        ("number of records in data.train", state["records"], sampler.size),
        ("data.difficulty or data.order", state.get("order", "shuffled"), sampler.name),
    ):
        if saved != given:
            raise ValueError(
                f"{path} was written with another {name} ({json.dumps([saved, given])}): "
                "the data would go on elsewhere; use another run.output"
            )
    if state["step"] > config.optim.steps:
        raise ValueError(
            f"{path} is {state['step']} steps in, optim.steps is {config.optim.steps}: "
            "use another run.output"
        )
