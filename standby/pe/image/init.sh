#!/usr/bin/busybox sh
# PID 1 of the PE. It stays a shell on purpose: if the agent were PID 1, its first uncaught exception would panic the
# kernel; here it is started again. busybox ash also reaps whatever is orphaned while it waits.
export PATH=/usr/sbin:/usr/bin:/opt/busybox
export HOME=/root LANG=C.UTF-8
# One thread of OpenBLAS and one malloc arena: the PE must fit beside the page cache in half a gigabyte.
export OPENBLAS_NUM_THREADS=1 MALLOC_ARENA_MAX=2
export PYTHONPATH=/opt/cdp/code:/opt/cdp/packages PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

/usr/bin/busybox mount -t devtmpfs -o mode=0755 devtmpfs /dev
exec </dev/console >/dev/console 2>&1
/usr/bin/busybox mount -t proc proc /proc
/usr/bin/busybox mount -t sysfs sysfs /sys
/usr/bin/busybox mount -t tmpfs -o mode=0755 tmpfs /run
/usr/bin/busybox mount -t tmpfs -o mode=1777 tmpfs /tmp
/usr/bin/busybox mkdir -p /dev/pts /opt/busybox /mnt
/usr/bin/busybox mount -t devpts devpts /dev/pts
/usr/bin/busybox --install -s /opt/busybox
hostname cdp-pe

while read -r module; do
    modprobe "$module" || echo "cdp-pe: module $module was not loaded"
done </etc/cdp-pe/modules
ip link set lo up

read -r arguments </proc/cmdline
case " $arguments " in
*" cdp.shell "*)
    echo "cdp-pe: a shell, as the kernel command line asks"
    setsid cttyhack sh
    ;;
esac

while :; do
    echo "cdp-pe: starting at $(cut -d' ' -f1 /proc/uptime) s"
    python3 -m standby.pe.main </dev/null
    echo "cdp-pe: ended with status $?; it is started again"
    sleep 1
done
