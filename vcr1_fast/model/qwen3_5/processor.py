"""The processor of Qwen3.5: prompts with times as text, in the settings files of Qwen3-VL."""

from dataclasses import dataclass
from typing import ClassVar

from vcr1_fast.model.timed_text import preprocessor
from vcr1_fast.model.timed_text import processor as timed


@dataclass(frozen=True)
class ImageProcessorConfig(preprocessor.ImageProcessorConfig):
    """Settings of images, as Qwen3.5's files name them."""

    classes: ClassVar[dict[str, str]] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen3VLProcessor",
    }


@dataclass(frozen=True)
class VideoProcessorConfig(preprocessor.VideoProcessorConfig):
    """Settings of clips, as Qwen3.5's files name them."""

    classes: ClassVar[dict[str, str]] = {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "processor_class": "Qwen3VLProcessor",
    }


@dataclass(frozen=True, eq=False)
class Processor(timed.Processor):
    """The processor of a Qwen3.5 checkpoint."""

    video_settings = VideoProcessorConfig
    image_settings = ImageProcessorConfig
    source = "models/qwen3_vl/processing_qwen3_vl.py"  # transformers has one for both families
