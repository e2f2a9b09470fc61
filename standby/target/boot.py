"""What the standby boots: our PE while it follows, its own disk once it has taken over."""

from __future__ import annotations

from dataclasses import dataclass

from standby.pe.image.recipe import KERNEL_ARGUMENTS


@dataclass(frozen=True)
class PeBoot:
    """Direct kernel boot. The paths are on the hypervisor.

    The domain must not be restarted by libvirt when the guest resets: the live domain keeps its ``<kernel>`` even
    after it was redefined, so a taken-over machine that reboots would come up in the PE. Therefore a reset ends it,
    and ``watch.RebootWatcher`` starts it again from the new definition.
    """

    kernel: str
    initrd: str
    arguments: str = KERNEL_ARGUMENTS


@dataclass(frozen=True)
class DiskBoot:
    """The first disk, by firmware and boot loader, as on any machine."""


Boot = PeBoot | DiskBoot
