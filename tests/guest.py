"""A small Linux guest under QEMU without KVM: a kernel, busybox and a script, up in seconds.

Debian's cloud kernel lies below .venv/guest (scripts/guest-kernel puts it there).
"""

import shutil
import subprocess
from pathlib import Path

from conftest import unavailable, wait_for

ROOT = Path(__file__).resolve().parents[1]
KERNEL = ROOT / ".venv/guest"
BUSYBOX = Path("/bin/busybox")
# In this order; what is built into the kernel is not there as a file.
MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev"),
    *("virtio_pci", "virtio_blk"),
)
_INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in {modules}; do insmod /modules/$module.ko; done
{script}
echo the guest has ended
sync
poweroff -f
"""


def virtio_disk(path: Path, number: int = 0) -> list[str]:
    """QEMU's options for a disk of the mount as the guest's /dev/vda, vdb, ..."""
    how = "format=raw,if=none,cache=none,discard=unmap,detect-zeroes=unmap"
    where = str(path).replace(",", ",,")
    return [
        *("-drive", f"file={where},id=disk{number},{how}"),
        *("-device", f"virtio-blk-pci,drive=disk{number}"),
    ]


class Guest:
    """One QEMU process; what the guest prints on its serial console is in ``said``.

    ``options`` are QEMU's, ``programs`` static executables that the script finds in /bin. The
    script is busybox's sh, and the guest powers off after it; lines given to `say` are its input.
    """

    def __init__(self, folder: Path, script: str, *options: str, programs: list[Path]) -> None:
        if not shutil.which("qemu-system-x86_64"):
            unavailable("qemu-system-x86 is missing")
        kernels = sorted((KERNEL / "boot").glob("vmlinuz-*"))
        if not kernels:
            unavailable("there is no guest kernel; run scripts/guest-kernel")
        initramfs = _initramfs(folder, script, programs)
        self._log = folder / "console.log"
        # What QEMU itself says must not come in the midst of a line of the guest's.
        with self._log.open("wb") as console, (folder / "qemu.log").open("wb") as errors:
            self.popen = subprocess.Popen(
                [
                    *("qemu-system-x86_64", "-accel", "tcg", "-m", "192", "-nodefaults"),
                    *("-display", "none", "-no-reboot", "-serial", "stdio"),
                    *("-kernel", str(kernels[-1]), "-initrd", str(initramfs)),
                    *("-append", "console=ttyS0 loglevel=4 panic=-1"),
                    *options,
                ],
                stdin=subprocess.PIPE,
                stdout=console,
                stderr=errors,
            )

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def say(self, line: str) -> None:
        """Type a line at the console."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(line.encode() + b"\n")
        self.popen.stdin.flush()

    def wait_said(self, text: str, seconds: float = 120.0) -> None:
        def is_there() -> bool:
            found = text in self.said
            assert found or self.popen.poll() is None, self.said
            return found

        wait_for(is_there, f"the guest says {text!r}", seconds)

    def wait_ended(self, seconds: float = 120.0) -> None:
        """Wait until the script has run to its end and the guest is off."""
        assert self.popen.wait(seconds) == 0, self.said
        assert "the guest has ended" in self.said, self.said

    def close(self) -> None:
        self.popen.kill()
        self.popen.communicate()


def compile_load(folder: Path) -> Path:
    """The program of tests/guest_load.c, static, named ``load``."""
    program = folder / "load"
    source = Path(__file__).with_name("guest_load.c")
    subprocess.run(["gcc", "-O1", "-static", "-o", program, source], check=True)
    return program


def _initramfs(folder: Path, script: str, programs: list[Path]) -> Path:
    if not BUSYBOX.exists():
        unavailable("busybox-static is missing")
    root = folder / "initramfs"
    for name in ("bin", "modules", "proc", "sys", "dev", "mnt"):
        (root / name).mkdir(parents=True)
    for program in (BUSYBOX, *programs):
        shutil.copy(program, root / "bin")
    applets = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True)
    for applet in set(applets.stdout.split()) - {"busybox", *(p.name for p in programs)}:
        (root / "bin" / applet).symlink_to("busybox")
    modules = []
    for name in MODULES:
        for found in KERNEL.rglob(f"{name}.ko"):
            shutil.copy(found, root / "modules")
            modules.append(name)
    (root / "init").write_text(_INIT.format(modules=" ".join(modules), script=script))
    (root / "init").chmod(0o755)
    archive = folder / "initramfs.cpio"
    names = "\n".join(["."] + [str(p.relative_to(root)) for p in sorted(root.rglob("*"))])
    with archive.open("wb") as file:
        subprocess.run(
            [BUSYBOX, "cpio", "-o", "-H", "newc"],
            cwd=root,
            input=names.encode(),
            stdout=file,
            stderr=subprocess.DEVNULL,
            check=True,
        )
    return archive
