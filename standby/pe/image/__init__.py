"""Builds the PE's kernel and initramfs: ``build(cache_dir, progress=print) -> PeImage``."""

from standby.pe.image.build import PeImage, build
from standby.pe.image.cache import default_cache_dir
from standby.pe.image.errors import ImageBuildFailed, ImageToolMissing

__all__ = ["ImageBuildFailed", "ImageToolMissing", "PeImage", "build", "default_cache_dir"]
