"""Annotation files as their authors publish them, a row of ours for each of their annotations."""

from vcr1_fast.data.formats import grounding, images, questions
from vcr1_fast.data.formats.files import Format

FORMATS: dict[str, Format] = {**grounding.FORMATS, **questions.FORMATS, **images.FORMATS}

__all__ = ["FORMATS", "Format"]
