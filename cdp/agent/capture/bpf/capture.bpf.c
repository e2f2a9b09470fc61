// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * Copies the payload of every write bio to a protected disk into one ring, in submission order; whatever it cannot copy
 * is stamped.
 *
 *   bio_queue     raw_tp/block_bio_queue     once per bio, after the partition remap, before issue: capture
 *   rq_complete*  raw_tp/block_rq_complete   failed writes and flushes, passthrough writes of request-based devices
 *   bio_complete* raw_tp/block_bio_complete  failed writes of bio-based devices
 *   mark          run by the session         stamps a range, or spreads a wide loss
 *   calibrate     raw_tp/block_bio_queue     attached at start only: where are page structures and memory?
 *
 * Invariants
 *   - For a loss: generation is raised, then the granules are stamped (atomic max), then `stamped` is raised.
 *   - A record carries the generation at its reservation, so that `drop_generation >= stamp` proves that its bio was
 *     submitted after the loss.
 *   - All records of a bio are emitted by one run. Only the run that emits its last piece sets LAST.
 *   - The kernel skips a program that is already running on the CPU. Completions interrupt each other: a task's, a soft
 *     interrupt's and a hard interrupt's, so each completion program is attached three times and one always runs. A
 *     skipped bio_queue is found by the kernel's own count of skipped runs (older kernels do not skip: see `busy`).
 * The layouts below are mirrored in layout.py and control.py.
 */
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#define PAYLOAD 4096
#define PIECES_MAX (1 << 20)
#define GRANULES_NARROW_MAX 4096 /* more are too many for an interrupt: see whole[] */
#define STAMP_TRIES 128          /* each failed try is another CPU's smaller generation: one per CPU at most */
#define CAUSES 16
#define DISKS 64
#define WALK_MAX 65536 /* GiB of physical memory to look through */

/* Kernel types: only what is used, relocated at load. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct page {
	unsigned long flags;
};
struct bio_vec {
	struct page *bv_page;
	unsigned int bv_len;
	unsigned int bv_offset;
};
struct bvec_iter {
	__u64 bi_sector;
	unsigned int bi_size;
	unsigned int bi_idx;
	unsigned int bi_bvec_done;
};
struct gendisk {
	int major;
	int first_minor;
};
struct block_device {
	struct gendisk *bd_disk;
};
struct bio_crypt_ctx;
struct bio {
	struct block_device *bi_bdev;
	unsigned int bi_opf;
	unsigned short bi_flags;
	unsigned char bi_status;
	struct bvec_iter bi_iter;
	struct bio_crypt_ctx *bi_crypt_context;
	unsigned short bi_vcnt;
	struct bio_vec *bi_io_vec;
};
struct bio___disk { /* before 5.12 */
	struct gendisk *bi_disk;
};
struct request_queue {
	struct gendisk *disk;
};
struct request {
	struct request_queue *q;
	unsigned int cmd_flags;
	unsigned int __data_len;
	__u64 __sector;
};
struct request___disk { /* before 5.17 */
	struct gendisk *rq_disk;
};
#pragma clang attribute pop

enum { OP_WRITE = 1, OP_FLUSH = 2, OP_DISCARD = 3, OP_WRITE_ZEROES = 9, OP_DRV_OUT = 35, OP_MASK = 0xff };
enum { BIO_CLONED_FLAG = 1 << 1 };
enum { KIND_DATA = 1, KIND_ZERO = 2, KIND_DISCARD = 3 };
enum { LAST = 1, ABANDONED = 2 };
enum {
	RING_FULL = 0,
	UNREADABLE_PAGE = 1,
	UNKNOWN_OP = 2,
	INLINE_ENCRYPTION = 3,
	FAILED_WRITE = 4,
	FAILED_FLUSH = 5,
	PASSTHROUGH = 6,
	MISSED_RUN = 7,
	QUIET = 1 << 31, /* a copy of a program: stamp again, do not count again */
};

/* Decided before loading; constant for the verifier, so that the other tracepoint form is dead code. */
const volatile struct {
	__u32 bio_argument; /* of block_bio_queue and block_bio_complete: index of the bio */
	__u32 page_shift;
} config = {};

struct record {
	__u64 bio;
	__u64 drop_generation;
	__u64 offset;
	__u64 length;
	__u64 submitted_ns;
	__u16 disk;
	__u8 op;
	__u8 flags;
	__u8 reserved[20];
	__u8 payload[PAYLOAD];
};
_Static_assert(sizeof(struct record) == 4160, "record layout");

struct control {
	__u64 abi;
	__u64 capture_id;
	__u64 vmemmap;
	__u64 page_offset;
	__u64 wake_bytes; /* wake the drainer each time this much was produced */
	__u64 unused[3];
	/* 64: one line that every loss writes and every record reads */
	__u64 generation;
	__u64 stamped;
	__u64 wide_events;
	__u64 unused_1[5];
	/* 128 */
	__u64 wake_at;
	__u64 unused_2[7];
	/* 192: written by the session only */
	__u64 wide_handled;
	__u64 missed_handled;
	__u64 unused_3[6];
	/* 256 */
	__u64 lost_events[CAUSES];
	__u64 lost_bytes[CAUSES];
	/* 512 */
	__u64 whole[DISKS]; /* generation of the last wide loss of each disk */
};

struct disk {
	__u32 slot;
	__u32 granule_shift;
	__u64 granules;
	__u64 size_bytes;
	__u64 diskseq;
};

struct work { /* per CPU: of the one bio whose run this is */
	__u64 serial;
	__u64 vecs;
	__u64 bvec_va;
	__u64 offset;
	__u64 submitted_ns;
	__u64 bio;
	__u32 bytes_left;
	__u32 bvec_left;
	__u32 bvec_skip;
	__u32 slot;
	__u32 failed; /* 1 + cause */
	__u32 busy;
};

struct calibration {
	__u64 ns_device;
	__u64 ns_inode;
	__u32 thread;
	__u32 major;
	__u32 minor;
	__u32 state; /* 1 learn, 2 verify; 0 done */
	__u64 pfn;
	__u64 magic[2];
	__u64 vmemmap;
	__u64 page_offset;
	__u64 base; /* of the walk */
	__u64 found;
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 16 << 20);
} ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct control);
} control SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, DISKS);
	__type(key, __u64); /* major << 32 | minor of the whole disk */
	__type(value, struct disk);
} disks SEC(".maps");

struct stamps_of_disk {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, DISKS);
	__type(key, __u32);
	__array(values, struct stamps_of_disk);
} stamps SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct work);
} works SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct calibration);
} calibrations SEC(".maps");

static __always_inline struct control *control_page(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

/* --- losses ---------------------------------------------------------------------------------------------------------- */

static __always_inline void raise_to(__u64 *cell, __u64 generation)
{
	for (int i = 0; i < STAMP_TRIES; i++) {
		__u64 seen = *(volatile __u64 *)cell;

		if (seen >= generation || __sync_val_compare_and_swap(cell, seen, generation) == seen)
			return;
	}
}

struct stamping {
	__u64 first;
	__u64 generation;
	__u32 slot;
	__u32 unused;
};

static long stamp_granule(__u32 i, struct stamping *s)
{
	__u32 slot = s->slot, granule = s->first + i;
	void *of_disk = bpf_map_lookup_elem(&stamps, &slot);
	__u64 *stamp;

	if (!of_disk)
		return 1;
	stamp = bpf_map_lookup_elem(of_disk, &granule);
	if (!stamp)
		return 1;
	raise_to(stamp, s->generation);
	return 0;
}

static __noinline void lose(struct disk *disk, __u64 offset, __u64 length, __u32 cause)
{
	struct control *c = control_page();
	__u64 first = offset >> disk->granule_shift, last, generation;

	if (!c)
		return;
	generation = __sync_fetch_and_add(&c->generation, 1) + 1;
	if (!(cause & QUIET)) {
		__sync_fetch_and_add(&c->lost_events[cause & (CAUSES - 1)], 1);
		__sync_fetch_and_add(&c->lost_bytes[cause & (CAUSES - 1)], length);
	}
	last = length ? (offset + length - 1) >> disk->granule_shift : first;
	if (!length || last - first >= GRANULES_NARROW_MAX) {
		raise_to(&c->whole[disk->slot & (DISKS - 1)], generation);
		__sync_fetch_and_add(&c->wide_events, 1);
		return;
	}
	if (last == first) { /* the usual case needs no callback */
		struct stamping one = {.first = first, .generation = generation, .slot = disk->slot};

		stamp_granule(0, &one);
	} else {
		struct stamping range = {.first = first, .generation = generation, .slot = disk->slot};

		bpf_loop(last - first + 1, stamp_granule, &range, 0);
	}
	__sync_fetch_and_add(&c->stamped, 1);
}

/* --- capture --------------------------------------------------------------------------------------------------------- */

static __always_inline struct disk *disk_of(struct gendisk *gendisk)
{
	__u64 key = (__u64)BPF_CORE_READ(gendisk, major) << 32 | (__u32)BPF_CORE_READ(gendisk, first_minor);

	return bpf_map_lookup_elem(&disks, &key);
}

static __always_inline struct gendisk *gendisk_of(struct bio *bio)
{
	if (bpf_core_field_exists(struct bio, bi_bdev))
		return BPF_CORE_READ(bio, bi_bdev, bd_disk);
	return BPF_CORE_READ((struct bio___disk *)bio, bi_disk);
}

static __always_inline __u64 address_of(__u64 page, __u64 vmemmap, __u64 page_offset)
{
	return ((page - vmemmap) / bpf_core_type_size(struct page) << config.page_shift) + page_offset;
}

/* The drainer sleeps until so much was produced: a wake-up per record would cost more than the copy. */
static __always_inline __u64 wake_flags(struct control *c)
{
	__u64 produced = bpf_ringbuf_query(&ring, BPF_RB_PROD_POS);

	if (produced < c->wake_at)
		return BPF_RB_NO_WAKEUP;
	c->wake_at = produced + c->wake_bytes;
	return BPF_RB_FORCE_WAKEUP;
}

static __always_inline struct record *reserve(struct control *c, struct work *w, __u8 op)
{
	struct record *r = bpf_ringbuf_reserve(&ring, sizeof(*r), 0);

	if (!r)
		return 0;
	r->bio = w->bio;
	r->drop_generation = *(volatile __u64 *)&c->generation;
	r->offset = w->offset;
	r->length = 0;
	r->submitted_ns = w->submitted_ns;
	r->disk = w->slot;
	r->op = op;
	r->flags = 0;
	__builtin_memset(r->reserved, 0, sizeof(r->reserved));
	return r;
}

/* A global function is verified once, by itself: the loop around it stays small for the verifier. */
__noinline int capture_piece(void)
{
	__u32 zero = 0, length;
	struct work *w = bpf_map_lookup_elem(&works, &zero);
	struct control *c = control_page();
	struct record *r;

	if (!w || !c || !w->bytes_left)
		return 1;
	if (!w->bvec_left) {
		struct bio_vec *vec = (struct bio_vec *)w->vecs;
		__u64 page = (__u64)BPF_CORE_READ(vec, bv_page);
		__u32 skip = w->bvec_skip, bytes = BPF_CORE_READ(vec, bv_len);

		if (bytes <= skip) {
			w->failed = 1 + UNREADABLE_PAGE;
			return 1;
		}
		w->bvec_va = address_of(page, c->vmemmap, c->page_offset) + BPF_CORE_READ(vec, bv_offset) + skip;
		w->bvec_left = bytes - skip;
		w->bvec_skip = 0;
		w->vecs += bpf_core_type_size(struct bio_vec);
	}
	length = w->bvec_left;
	if (length > w->bytes_left)
		length = w->bytes_left;
	if (length > PAYLOAD)
		length = PAYLOAD;
	r = reserve(c, w, KIND_DATA);
	if (!r) {
		w->failed = 1 + RING_FULL;
		return 1;
	}
	r->length = length;
	barrier_var(length);
	if (length > PAYLOAD || bpf_probe_read_kernel(r->payload, length, (void *)w->bvec_va)) {
		r->flags = ABANDONED;
		bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
		w->failed = 1 + UNREADABLE_PAGE;
		return 1;
	}
	if (length == w->bytes_left)
		r->flags = LAST;
	bpf_ringbuf_submit(r, wake_flags(c));
	w->bvec_va += length;
	w->bvec_left -= length;
	w->offset += length;
	w->bytes_left -= length;
	return w->bytes_left == 0;
}

static long next_piece(__u32 i, void *unused)
{
	return capture_piece() != 0;
}

static __always_inline void abandon(struct control *c, struct work *w)
{
	struct record *r = reserve(c, w, KIND_DATA);

	if (!r) /* no room for that either: the reader finds the bio incomplete */
		return;
	r->flags = ABANDONED;
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
}

static __always_inline struct bio *bio_argument(struct bpf_raw_tracepoint_args *ctx)
{
	struct bio *bio;

	/* Constant context offsets: the barriers keep the compiler from computing one. */
	if (config.bio_argument == 0) {
		bio = (struct bio *)ctx->args[0];
		barrier_var(bio);
	} else {
		bio = (struct bio *)ctx->args[1];
		barrier_var(bio);
	}
	return bio;
}

static __always_inline void capture(struct control *c, struct work *w, struct disk *disk, struct bio *bio, __u32 op,
				    __u32 size)
{
	__u64 offset = BPF_CORE_READ(bio, bi_iter.bi_sector) << 9;

	w->bio = ++w->serial << 16 | (bpf_get_smp_processor_id() & 0xffff);
	w->submitted_ns = bpf_ktime_get_ns();
	w->slot = disk->slot;
	w->offset = offset;
	if (op == OP_DISCARD || op == OP_WRITE_ZEROES) {
		struct record *r = reserve(c, w, op == OP_DISCARD ? KIND_DISCARD : KIND_ZERO);

		if (!r) {
			lose(disk, offset, size, RING_FULL);
			return;
		}
		r->length = size;
		r->flags = LAST;
		bpf_ringbuf_submit(r, wake_flags(c));
		return;
	}
	if (op != OP_WRITE) {
		lose(disk, offset, size, UNKNOWN_OP);
		return;
	}
	if (bpf_core_field_exists(struct bio, bi_crypt_context) && BPF_CORE_READ(bio, bi_crypt_context)) {
		lose(disk, offset, size, INLINE_ENCRYPTION);
		return;
	}
	w->vecs = (__u64)BPF_CORE_READ(bio, bi_io_vec) +
		  (__u64)BPF_CORE_READ(bio, bi_iter.bi_idx) * bpf_core_type_size(struct bio_vec);
	w->bvec_skip = BPF_CORE_READ(bio, bi_iter.bi_bvec_done);
	w->bvec_left = 0;
	w->bytes_left = size;
	w->failed = 0;
	bpf_loop(PIECES_MAX, next_piece, 0, 0);
	if (!w->bytes_left)
		return;
	lose(disk, offset, size, w->failed ? w->failed - 1 : UNREADABLE_PAGE);
	if (w->failed != 1 + UNREADABLE_PAGE)
		abandon(c, w);
}

SEC("raw_tp/block_bio_queue")
int bio_queue(struct bpf_raw_tracepoint_args *ctx)
{
	struct bio *bio = bio_argument(ctx);
	__u32 op = BPF_CORE_READ(bio, bi_opf) & OP_MASK, size, zero = 0;
	struct control *c;
	struct disk *disk;
	struct work *w;

	/* Reads, flushes and every other operation that carries nothing to the disk are even. */
	if (!(op & 1))
		return 0;
	size = BPF_CORE_READ(bio, bi_iter.bi_size);
	if (!size) /* an empty flush: a prefix of the submission order is stricter than what it asks for */
		return 0;
	disk = disk_of(gendisk_of(bio));
	if (!disk)
		return 0;
	w = bpf_map_lookup_elem(&works, &zero);
	c = control_page();
	if (!w || !c)
		return 0;
	if (w->busy) { /* an interrupt submits while this CPU is capturing, and this kernel does not skip it */
		lose(disk, BPF_CORE_READ(bio, bi_iter.bi_sector) << 9, size, MISSED_RUN);
		return 0;
	}
	w->busy = 1;
	barrier();
	capture(c, w, disk, bio, op, size);
	barrier();
	w->busy = 0;
	return 0;
}

/* --- completions ----------------------------------------------------------------------------------------------------- */

static __always_inline struct gendisk *gendisk_of_request(struct request *rq)
{
	if (bpf_core_field_exists(struct request_queue, disk))
		return BPF_CORE_READ(rq, q, disk);
	return BPF_CORE_READ((struct request___disk *)rq, rq_disk);
}

static __always_inline int request_completed(struct bpf_raw_tracepoint_args *ctx, __u32 quiet)
{
	struct request *rq = (struct request *)ctx->args[0];
	int error = (int)ctx->args[1];
	__u32 op = BPF_CORE_READ(rq, cmd_flags) & OP_MASK, bytes = (__u32)ctx->args[2], left;
	struct disk *disk;

	if (op != OP_DRV_OUT && !((error & 0xff) && ((op & 1) || op == OP_FLUSH)))
		return 0;
	disk = disk_of(gendisk_of_request(rq));
	if (!disk)
		return 0;
	if (op == OP_DRV_OUT) { /* SG_IO and the like: what it did, where, and whether an error undid it is unknown */
		lose(disk, 0, 0, PASSTHROUGH | quiet);
	} else if (op == OP_FLUSH) { /* anything that completed since the last flush may be gone */
		lose(disk, 0, 0, FAILED_FLUSH | quiet);
	} else {
		left = BPF_CORE_READ(rq, __data_len);
		if (bytes < left)
			bytes = left;
		lose(disk, BPF_CORE_READ(rq, __sector) << 9, bytes, FAILED_WRITE | quiet);
	}
	return 0;
}

static __always_inline int bio_completed(struct bpf_raw_tracepoint_args *ctx, __u32 quiet)
{
	/* (queue, bio) since 5.10 in every kernel that has bpf_loop */
	struct bio *bio = (struct bio *)ctx->args[1];
	__u32 op;
	struct disk *disk;

	if (!BPF_CORE_READ(bio, bi_status))
		return 0;
	op = BPF_CORE_READ(bio, bi_opf) & OP_MASK;
	if (!(op & 1) && op != OP_FLUSH)
		return 0;
	disk = disk_of(gendisk_of(bio));
	if (!disk)
		return 0;
	/* How far the driver has advanced the iterator is its own affair, so the range is not known any more. */
	lose(disk, 0, 0, (op == OP_FLUSH ? FAILED_FLUSH : FAILED_WRITE) | quiet);
	return 0;
}

#define COPY(name, tracepoint, body, quiet)                                                                            \
	SEC("raw_tp/" #tracepoint)                                                                                     \
	int name(struct bpf_raw_tracepoint_args *ctx)                                                                  \
	{                                                                                                              \
		return body(ctx, quiet);                                                                               \
	}

COPY(rq_complete, block_rq_complete, request_completed, 0)
COPY(rq_complete_1, block_rq_complete, request_completed, QUIET)
COPY(rq_complete_2, block_rq_complete, request_completed, QUIET)
COPY(bio_complete, block_bio_complete, bio_completed, 0)
COPY(bio_complete_1, block_bio_complete, bio_completed, QUIET)
COPY(bio_complete_2, block_bio_complete, bio_completed, QUIET)

/* --- run by the session ---------------------------------------------------------------------------------------------- */

/* args: key of the disk, first granule or byte offset, count or length, generation or 0, cause.
 * With a generation: raise the stamps of `count` granules to it (spreading a wide loss, which has been counted).
 * Without: a loss of its own, in bytes; length 0 means the whole disk. */
SEC("raw_tp")
int mark(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 key = ctx->args[0], start = ctx->args[1], count = ctx->args[2], generation = ctx->args[3];
	struct disk *disk = bpf_map_lookup_elem(&disks, &key);

	if (!disk)
		return 1;
	if (generation) {
		struct stamping range = {.first = start, .generation = generation, .slot = disk->slot};

		bpf_loop(count, stamp_granule, &range, 0);
	} else {
		lose(disk, start, count, ctx->args[4]);
	}
	return 0;
}

/* --- calibration ----------------------------------------------------------------------------------------------------- */

static __always_inline int magic_at(struct calibration *k, __u64 address)
{
	__u64 there[2] = {};

	if (bpf_probe_read_kernel(there, sizeof(there), (void *)address))
		return 0;
	return there[0] == k->magic[0] && there[1] == k->magic[1];
}

__noinline int try_page_offset(__u32 i)
{
	__u32 zero = 0;
	struct calibration *k = bpf_map_lookup_elem(&calibrations, &zero);
	__u64 candidate;

	if (!k)
		return 1;
	candidate = k->base - ((__u64)i << 30);
	if (!magic_at(k, candidate + (k->pfn << config.page_shift)))
		return 0;
	k->page_offset = candidate;
	k->found++;
	return 1;
}

static long walk(__u32 i, void *unused)
{
	return try_page_offset(i) != 0;
}

SEC("raw_tp/block_bio_queue")
int calibrate(struct bpf_raw_tracepoint_args *ctx)
{
	struct bio *bio = bio_argument(ctx);
	struct bpf_pidns_info me = {};
	struct calibration *k;
	struct gendisk *gendisk;
	struct bio_vec *vec;
	__u64 page;
	__u32 zero = 0;

	k = bpf_map_lookup_elem(&calibrations, &zero);
	if (!k || !k->state || (BPF_CORE_READ(bio, bi_opf) & OP_MASK) != 0)
		return 0;
	if (bpf_get_ns_current_pid_tgid(k->ns_device, k->ns_inode, &me, sizeof(me)) || me.pid != k->thread)
		return 0;
	gendisk = gendisk_of(bio);
	if (BPF_CORE_READ(gendisk, major) != k->major || BPF_CORE_READ(gendisk, first_minor) != k->minor)
		return 0;
	vec = (struct bio_vec *)((__u64)BPF_CORE_READ(bio, bi_io_vec) +
				 (__u64)BPF_CORE_READ(bio, bi_iter.bi_idx) * bpf_core_type_size(struct bio_vec));
	page = (__u64)BPF_CORE_READ(vec, bv_page);
	if (k->state == 1) {
		/* The read has not happened yet: the page still holds the magic. A gendisk lies in the linear map,
		 * whose start is aligned to 1 GiB, at or below it. */
		k->vmemmap = page - k->pfn * bpf_core_type_size(struct page);
		k->base = (__u64)gendisk & ~((1ULL << 30) - 1);
		bpf_loop(WALK_MAX, walk, 0, 0);
	} else if (magic_at(k, address_of(page, k->vmemmap, k->page_offset))) {
		k->found++;
	}
	k->state = 0;
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
