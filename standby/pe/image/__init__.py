"""Builds the PE's kernel and initramfs.

build(cache_dir, progress=print) -> PeImage      what the cache does not have is made
install(image, directory)                        copies it to where the server looks for it
installed(directory) -> PeImage                  what the server gives to hypervisors
"""

from standby.pe.image.build import PeImage, build, install, installed
from standby.pe.image.cache import default_cache_dir
from standby.pe.image.errors import ImageBuildFailed, ImageToolMissing, PeImageMissing

__all__ = [
    "ImageBuildFailed",
    "ImageToolMissing",
    "PeImage",
    "PeImageMissing",
    "build",
    "default_cache_dir",
    "install",
    "installed",
]
