// SPDX-License-Identifier: GPL-2.0
/*
 * A TCG plugin for QEMU that counts a guest's instructions.
 *
 * Every executed instruction is counted at its address, in granules of 16 bytes, which is how Linux aligns functions. At a cut, what
 * has been counted since the cut before is written to a file. The guest asks for a cut with a magic nop (see marker.h); spans of its
 * code are cut where they are entered and left. Every cut leaves a line in QEMU's log as well, so that trace events can be told apart
 * by where they stand.
 *
 * For guests with one processor and -icount shift=0, where the time stamp counter counts nanoseconds.
 *
 * usage: -plugin plugin.so,out=FILE,spans=FILE[,point=NAME:ADDRESS]... -d plugin
 *
 * A line NAME:FIRST:END of the file is a span, which is left at its "ret". It is read at the first mark, when the guest has loaded its
 * modules; none of that code may have run before. A point is only logged, with the time.
 */

#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "marker.h"

/*
 * QEMU's plugin interface, version 7, as far as it is used here: Debian ships no header. What is GLib's there stays opaque or is
 * declared with the members that GLib makes public.
 */

#define EXPORT __attribute__((visibility("default")))

struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_plugin_register;
struct qemu_plugin_scoreboard;

typedef struct {
	struct qemu_plugin_scoreboard *score;
	size_t offset;
} qemu_plugin_u64;

typedef struct {
	struct qemu_plugin_register *handle;
	const char *name;
	const char *feature;
	bool is_readonly;
} qemu_plugin_reg_descriptor;

typedef struct {
	qemu_plugin_reg_descriptor *data;
	unsigned int len;
} GArray;

typedef struct {
	uint8_t *data;
	unsigned int len;
} GByteArray;

enum {
	QEMU_PLUGIN_CB_NO_REGS,
	QEMU_PLUGIN_CB_R_REGS,
};

enum {
	QEMU_PLUGIN_INLINE_ADD_U64,
	QEMU_PLUGIN_INLINE_STORE_U64,
};

enum {
	QEMU_PLUGIN_COND_EQ = 2,
};

typedef void (*vcpu_cb)(unsigned int vcpu, void *data);

void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*cb)(struct qemu_plugin_tb *tb, void *data), void *data);
void qemu_plugin_register_vcpu_init_cb(uint64_t id, vcpu_cb cb, void *data);
void qemu_plugin_register_vcpu_tb_exec_cond_cb(struct qemu_plugin_tb *tb, vcpu_cb cb, int flags, int cond, qemu_plugin_u64 entry,
					       uint64_t imm, void *data);
void qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(struct qemu_plugin_tb *tb, int op, qemu_plugin_u64 entry, uint64_t imm);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *insn, vcpu_cb cb, int flags, void *data);
void qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(struct qemu_plugin_insn *insn, int op, qemu_plugin_u64 entry, uint64_t imm);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *insn);
size_t qemu_plugin_insn_data(const struct qemu_plugin_insn *insn, void *to, size_t size);
struct qemu_plugin_scoreboard *qemu_plugin_scoreboard_new(size_t element_size);
void *qemu_plugin_scoreboard_find(struct qemu_plugin_scoreboard *score, unsigned int vcpu);
GArray *qemu_plugin_get_registers(void);
bool qemu_plugin_read_register(struct qemu_plugin_register *handle, GByteArray *to);
void qemu_plugin_outs(const char *text);
GByteArray *g_byte_array_new(void);
GByteArray *g_byte_array_set_size(GByteArray *array, unsigned int size);

EXPORT int qemu_plugin_version = 7;

#define GRANULE		16
#define MAX_GRANULES	(1u << 19)
#define HASH_SIZE	(2 * MAX_GRANULES)
#define MAX_PLACES	16

/* The element of the scoreboard, of which the guest's one processor has one. */
struct counters {
	uint64_t tsc_was_read;
	uint64_t since_tsc;
	uint64_t granules[MAX_GRANULES];
};

/* A span or, if it has no end, a point. */
struct place {
	const char *name;
	uint64_t first;
	uint64_t end;
};

static struct qemu_plugin_scoreboard *score;
static uint64_t granule_address[MAX_GRANULES];
static uint64_t granule_before[MAX_GRANULES];
static uint32_t granule_hash[HASH_SIZE];
static uint32_t granules;
static struct place places[MAX_PLACES];
static unsigned int nr_places;
static uint64_t last_tsc;
static struct qemu_plugin_register *rax, *rdx;
static GByteArray *value;
static bool measuring;
static const char *spans_path;
static FILE *out;

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* A line in QEMU's log. */
static void say(const char *format, ...)
{
	char line[128];
	va_list list;

	va_start(list, format);
	vsnprintf(line, sizeof(line), format, list);
	va_end(list);
	qemu_plugin_outs(line);
}

static void __attribute__((noreturn)) die(const char *why)
{
	fprintf(stderr, "count plugin: %s\n", why);
	exit(1);
}

static struct counters *counters(void)
{
	return qemu_plugin_scoreboard_find(score, 0);
}

static uint32_t granule_of(uint64_t address)
{
	/* User space is one granule: the benchmark is the same whatever driver it runs on. */
	uint64_t key = address >> 63 ? address / GRANULE : 0;
	uint64_t slot = (key * UINT64_C(0x9e3779b97f4a7c15) >> 32) % HASH_SIZE;

	/* A slot has the granule's number plus one. */
	for (; granule_hash[slot]; slot = (slot + 1) % HASH_SIZE) {
		if (granule_address[granule_hash[slot] - 1] == key * GRANULE)
			return granule_hash[slot] - 1;
	}
	if (granules == MAX_GRANULES)
		die("the guest has run more code than there is room for");
	granule_address[granules] = key * GRANULE;
	granule_hash[slot] = ++granules;
	return granules - 1;
}

/* The guest's clock in nanoseconds: an instruction takes one, and whoever was idle has read the clock since. */
static uint64_t now(void)
{
	return last_tsc + counters()->since_tsc;
}

static void cut(const char *what, const char *name)
{
	const uint64_t *count = counters()->granules;
	uint64_t clock = now();

	fprintf(out, "cut %s %s %" PRIu64 "\n", what, name, clock);
	for (uint32_t i = 0; i < granules; i++) {
		if (count[i] == granule_before[i])
			continue;
		fprintf(out, "%" PRIx64 " %" PRIu64 "\n", granule_address[i], count[i] - granule_before[i]);
		granule_before[i] = count[i];
	}
	fflush(out);
	say("bench %s %s %" PRIu64 "\n", what, name, clock);
}

/* name:first:end or name:address */
static void add_place(char *text)
{
	struct place *place = &places[nr_places];
	char *first, *end;

	if (nr_places == MAX_PLACES)
		die("too many places");
	place->name = strtok_r(text, ":", &text);
	first = strtok_r(NULL, ":", &text);
	end = strtok_r(NULL, ":", &text);
	if (!place->name || !first)
		die("a place looks like name:address or name:first:end");
	place->first = strtoull(first, NULL, 16);
	place->end = end ? strtoull(end, NULL, 16) : 0;
	nr_places++;
}

static void read_spans(void)
{
	FILE *file = fopen(spans_path, "r");
	char line[128];

	if (!file)
		die("no file with spans");
	while (fgets(line, sizeof(line), file))
		add_place(strdup(line));
	fclose(file);
}

static void marker_reached(unsigned int vcpu, void *data)
{
	static bool spans_are_read;

	switch ((uintptr_t)data) {
	case MARKER_START:
		if (!spans_are_read)
			read_spans();
		spans_are_read = true;
		cut("start", "-");
		measuring = true;
		break;
	case MARKER_STOP:
		cut("stop", "-");
		measuring = false;
		break;
	case MARKER_SETTLED:
		cut("settled", "-");
		break;
	}
}

static void span_entered(unsigned int vcpu, void *data)
{
	if (measuring)
		cut("enter", ((struct place *)data)->name);
}

static void span_left(unsigned int vcpu, void *data)
{
	if (measuring)
		cut("leave", ((struct place *)data)->name);
}

static void point_reached(unsigned int vcpu, void *data)
{
	say("bench point %s %" PRIu64 "\n", ((struct place *)data)->name, now());
}

static uint32_t low_half(struct qemu_plugin_register *handle)
{
	uint32_t half;

	g_byte_array_set_size(value, 0);
	if (!qemu_plugin_read_register(handle, value) || value->len < sizeof(half))
		die("a register cannot be read");
	memcpy(&half, value->data, sizeof(half));
	return half;
}

/* The instruction before read the time stamp counter, and its result is still there. */
static void tsc_was_read(unsigned int vcpu, void *data)
{
	last_tsc = (uint64_t)low_half(rdx) << 32 | low_half(rax);
	counters()->tsc_was_read = 0;
	counters()->since_tsc = 0;
}

static void translate_insn(struct qemu_plugin_insn *insn)
{
	uint64_t address = qemu_plugin_insn_vaddr(insn);
	uint8_t code[MARKER_SIZE] = {};
	qemu_plugin_u64 counter = {
		score, offsetof(struct counters, granules) + granule_of(address) * sizeof(uint64_t),
	};
	qemu_plugin_u64 flag = { score, offsetof(struct counters, tsc_was_read) };
	size_t size = qemu_plugin_insn_data(insn, code, sizeof(code));
	static const uint8_t rdtsc[] = { 0x0f, 0x31 };
	static const uint8_t rdtscp[] = { 0x0f, 0x01, 0xf9 };

	qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(insn, QEMU_PLUGIN_INLINE_ADD_U64, counter, 1);
	if (size == sizeof(code)) {
		for (uintptr_t marker = MARKER_START; marker <= MARKER_SETTLED; marker++) {
			const uint8_t nop[] = { MARKER_BYTES, marker };

			if (!memcmp(code, nop, sizeof(nop)))
				qemu_plugin_register_vcpu_insn_exec_cb(insn, marker_reached, QEMU_PLUGIN_CB_NO_REGS,
								       (void *)marker);
		}
	}
	if ((size == sizeof(rdtsc) && !memcmp(code, rdtsc, size)) || (size == sizeof(rdtscp) && !memcmp(code, rdtscp, size)))
		qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(insn, QEMU_PLUGIN_INLINE_STORE_U64, flag, 1);

	for (struct place *place = places; place < places + nr_places; place++) {
		if (address == place->first)
			qemu_plugin_register_vcpu_insn_exec_cb(insn, place->end ? span_entered : point_reached,
							       QEMU_PLUGIN_CB_NO_REGS, place);
		else if (place->first < address && address < place->end && size == 1 && code[0] == 0xc3)
			qemu_plugin_register_vcpu_insn_exec_cb(insn, span_left, QEMU_PLUGIN_CB_NO_REGS, place);
	}
}

static void translate(struct qemu_plugin_tb *tb, void *data)
{
	qemu_plugin_u64 flag = { score, offsetof(struct counters, tsc_was_read) };
	qemu_plugin_u64 since = { score, offsetof(struct counters, since_tsc) };
	size_t insns = qemu_plugin_tb_n_insns(tb);

	qemu_plugin_register_vcpu_tb_exec_cond_cb(tb, tsc_was_read, QEMU_PLUGIN_CB_R_REGS, QEMU_PLUGIN_COND_EQ, flag, 1, NULL);
	qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(tb, QEMU_PLUGIN_INLINE_ADD_U64, since, insns);
	for (size_t i = 0; i < insns; i++)
		translate_insn(qemu_plugin_tb_get_insn(tb, i));
}

static void vcpu_init(unsigned int vcpu, void *data)
{
	GArray *registers = qemu_plugin_get_registers();

	if (vcpu != 0)
		die("the guest has more than one processor");
	for (unsigned int i = 0; i < registers->len; i++) {
		if (!strcmp(registers->data[i].name, "rax"))
			rax = registers->data[i].handle;
		if (!strcmp(registers->data[i].name, "rdx"))
			rdx = registers->data[i].handle;
	}
	if (!rax || !rdx)
		die("the processor has no rax and rdx");
}

EXPORT int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv)
{
	for (int i = 0; i < argc; i++) {
		char *text = strchr(argv[i], '=');

		if (!text)
			die("an argument has no value");
		*text++ = '\0';
		if (!strcmp(argv[i], "out"))
			out = fopen(text, "w");
		else if (!strcmp(argv[i], "spans"))
			spans_path = strdup(text);
		else
			add_place(strdup(text));
	}
	if (!out || !spans_path)
		die("a file to write to and one with spans are needed");
	value = g_byte_array_new();
	score = qemu_plugin_scoreboard_new(sizeof(struct counters));
	qemu_plugin_register_vcpu_init_cb(id, vcpu_init, NULL);
	qemu_plugin_register_vcpu_tb_trans_cb(id, translate, NULL);
	return 0;
}
