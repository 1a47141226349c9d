"""Other people's weights on our code: folders in diffusers' layout, read and written."""

from minidiff.pretrained.export import export_folder
from minidiff.pretrained.pipeline import Pipeline, load_pipeline
from minidiff.pretrained.scheduler import Sampling, read_scheduler

__all__ = ["Pipeline", "Sampling", "export_folder", "load_pipeline", "read_scheduler"]
