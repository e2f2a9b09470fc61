"""From the block layer to the raw spool.

    block_bio_queue ─► BPF program ─► ring ─► drainer process ─► raw spool ─► pipeline (another process)
                          └─ what it could not record ─► stamps (per granule), counters, drop generation

``layout``   the numbers that the BPF program, the drainer and the reader share (no numpy)
``record``   one captured piece of a bio as a numpy structure
``devices``  what a path names, and whether it can be protected
``kernel``   whether this kernel can capture
``libbpf``   ctypes binding
``calibrate`` where the kernel keeps page structures and memory
``pins``     creating, opening and removing the pinned objects
``session``  ``CaptureSession``: attach, re-open, losses, detach
``drain``    the drainer: ``python -m cdp.agent.capture.drain``
``spool``    ``RawSpool``: the reader
``settle``   ``wait_settled``: every write submitted before a moment has completed

How a consumer uses it
    1. ``devices.inspect`` and ``check_protectable`` each disk; ``CaptureSession.attach(devices, pin_dir)``; start the
       drainer; ``RawSpool.open(spool_dir, session.capture_id)``.
    2. Cut: ``mark = await spool.wait_mark(end_of_second_ns)``; everything that was submitted before
       ``mark.monotonic_ns`` lies below ``mark.position``; then ``session.losses()`` (read *after* the mark).
    3. ``for records in spool.read(previous_cut, mark.position)``; apply; persist; ``spool.release(mark.position)``.

Rules the consumer relies on
    - Ring positions grow for as long as ``capture_id`` stays the same; with another ``capture_id`` they start at 0
      and everything in between is lost (all disks dirty).
    - The records of one bio are emitted by one uninterrupted run of the BPF program. A bio without its ``LAST`` record
      at the cut belongs to the next segment; if its ``submitted_ns`` is more than ``layout.BIO_COMPLETE_NS_MAX`` before
      the mark, its tail did not fit into the ring: it is abandoned, its range has been stamped.
    - ``ABANDONED`` on any record of a bio: ignore the whole bio; its range has been stamped.
    - A record with ``drop_generation >= stamp(granule)`` was submitted after the loss and wins over a re-read of the
      granule; with a smaller one the re-read wins.
    - ``session.losses().complete`` is False while some loss is still being stamped: its stamps are not all visible.

This module stays empty of imports: the drainer must start fast and stay small.
"""
