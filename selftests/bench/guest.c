// SPDX-License-Identifier: GPL-2.0
/*
 * The benchmark's part in the guest: does what a client of the display does, again and again between marks that the plugin sees.
 *
 * usage: virtgpu-bench operations
 *        virtgpu-bench suspend BUFFERS TIMES
 *
 * Each operation is reported with a line, "measured NAME COUNT NANOSECONDS" or "skipped NAME REASON", in the order of the marks. The
 * line "before" comes before the first suspend. It, and the report of each suspend, are to be answered with a line.
 */

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <drm/drm.h>
#include <drm/drm_fourcc.h>
#include <drm/drm_mode.h>

#include "marker.h"

#define CURSOR_SIZE	64
#define BYTES_PER_PIXEL	4

/* How often an operation is done before it counts, so that caches are filled and code is translated. */
#define WARM_UP		4

/* How long what an operation set off, and did not wait for, may go on. */
#define SETTLE_US	50000

struct buffer {
	uint32_t handle;
	uint32_t pitch;
	uint64_t size;
	uint32_t width;
	uint32_t height;
	uint32_t fb;
};

/* Properties of the plane and the CRTC that are set by name. */
struct properties {
	uint32_t fb_id, crtc_id, src_x, src_y, src_w, src_h, crtc_x, crtc_y, crtc_w, crtc_h;
	uint32_t active;
};

static int card;
static uint32_t connector, crtc, plane;
static struct properties props;
static struct drm_mode_modeinfo mode;
static struct buffer frames[2];
static struct buffer cursors[2];
static int shown;

static void __attribute__((noreturn, format(printf, 1, 2))) die(const char *format, ...)
{
	va_list list;

	va_start(list, format);
	fputs("virtgpu-bench: ", stderr);
	vfprintf(stderr, format, list);
	fprintf(stderr, ": %s\n", strerror(errno));
	va_end(list);
	exit(1);
}

static void check(int result, const char *what)
{
	if (result < 0)
		die("%s", what);
}

/* What follows is compiled into the loops: the user's part of the figures is as small as can be. */

static int create_dumb(struct buffer *buffer, uint32_t width, uint32_t height)
{
	struct drm_mode_create_dumb create = { .width = width, .height = height, .bpp = 8 * BYTES_PER_PIXEL };

	if (ioctl(card, DRM_IOCTL_MODE_CREATE_DUMB, &create))
		return -1;
	*buffer = (struct buffer){
		.handle = create.handle, .pitch = create.pitch, .size = create.size, .width = width, .height = height,
	};
	return 0;
}

static uint8_t *map_dumb(const struct buffer *buffer)
{
	struct drm_mode_map_dumb map = { .handle = buffer->handle };
	void *start;

	if (ioctl(card, DRM_IOCTL_MODE_MAP_DUMB, &map))
		return NULL;
	start = mmap(NULL, buffer->size, PROT_READ | PROT_WRITE, MAP_SHARED, card, map.offset);
	return start == MAP_FAILED ? NULL : start;
}

static int destroy_dumb(const struct buffer *buffer)
{
	struct drm_mode_destroy_dumb destroy = { .handle = buffer->handle };

	return ioctl(card, DRM_IOCTL_MODE_DESTROY_DUMB, &destroy);
}

/* A pattern in which every page differs from every other. */
static void draw(const struct buffer *buffer, uint32_t seed)
{
	uint32_t *pixels = (uint32_t *)map_dumb(buffer);

	if (!pixels)
		die("mapping a buffer");
	for (uint32_t i = 0; i < buffer->size / sizeof(*pixels); i++)
		pixels[i] = (i * 0x10f + seed * 0x3b1f) & 0xffffff;
	munmap(pixels, buffer->size);
}

static void add_fb(struct buffer *buffer)
{
	struct drm_mode_fb_cmd2 add = {
		.width = buffer->width,
		.height = buffer->height,
		.pixel_format = DRM_FORMAT_XRGB8888,
		.handles = { buffer->handle },
		.pitches = { buffer->pitch },
	};

	check(ioctl(card, DRM_IOCTL_MODE_ADDFB2, &add), "ADDFB2");
	buffer->fb = add.fb_id;
}

static int set_crtc(uint32_t fb)
{
	struct drm_mode_crtc set = { .crtc_id = crtc };

	if (fb) {
		set.set_connectors_ptr = (uintptr_t)&connector;
		set.count_connectors = 1;
		set.fb_id = fb;
		set.mode = mode;
		set.mode_valid = 1;
	}
	return ioctl(card, DRM_IOCTL_MODE_SETCRTC, &set);
}

static int wait_flip(void)
{
	struct pollfd fd = { .fd = card, .events = POLLIN };
	char events[256];

	if (poll(&fd, 1, 10000) != 1) {
		errno = ETIME;
		return -1;
	}
	return read(card, events, sizeof(events)) > 0 ? 0 : -1;
}

/* Sets properties of one object. */
static int commit(uint32_t object, uint32_t count, uint32_t *ids, uint64_t *values, uint32_t flags)
{
	struct drm_mode_atomic atomic = {
		.flags = flags,
		.count_objs = 1,
		.objs_ptr = (uintptr_t)&object,
		.count_props_ptr = (uintptr_t)&count,
		.props_ptr = (uintptr_t)ids,
		.prop_values_ptr = (uintptr_t)values,
	};

	return ioctl(card, DRM_IOCTL_MODE_ATOMIC, &atomic);
}

static int flip(uint32_t flags)
{
	uint64_t fb;

	shown = !shown;
	fb = frames[shown].fb;
	return commit(plane, 1, &props.fb_id, &fb, flags);
}

static int flip_blocking(void)
{
	return flip(0);
}

static int flip_event(void)
{
	if (flip(DRM_MODE_ATOMIC_NONBLOCK | DRM_MODE_PAGE_FLIP_EVENT))
		return -1;
	return wait_flip();
}

static int flip_legacy(void)
{
	struct drm_mode_crtc_page_flip legacy = {
		.crtc_id = crtc,
		.flags = DRM_MODE_PAGE_FLIP_EVENT,
	};

	shown = !shown;
	legacy.fb_id = frames[shown].fb;
	if (ioctl(card, DRM_IOCTL_MODE_PAGE_FLIP, &legacy))
		return -1;
	return wait_flip();
}

static int dirty(struct drm_clip_rect *clips, uint32_t count)
{
	struct drm_mode_fb_dirty_cmd command = {
		.fb_id = frames[shown].fb,
		.num_clips = count,
		.clips_ptr = (uintptr_t)clips,
	};

	return ioctl(card, DRM_IOCTL_MODE_DIRTYFB, &command);
}

static int dirty_full(void)
{
	return dirty(NULL, 0);
}

static int dirty_small(void)
{
	struct drm_clip_rect clip = { 128, 128, 192, 192 };

	return dirty(&clip, 1);
}

static int dirty_eight(void)
{
	struct drm_clip_rect clips[8];

	for (int i = 0; i < 8; i++)
		clips[i] = (struct drm_clip_rect){ 64 * i, 32 * i, 64 * i + 32, 32 * i + 32 };
	return dirty(clips, 8);
}

static int cursor_image(void)
{
	static int which;
	struct drm_mode_cursor cursor = {
		.flags = DRM_MODE_CURSOR_BO,
		.crtc_id = crtc,
		.width = CURSOR_SIZE,
		.height = CURSOR_SIZE,
	};

	if (!cursors[0].handle) {
		for (int i = 0; i < 2; i++)
			check(create_dumb(&cursors[i], CURSOR_SIZE, CURSOR_SIZE), "creating a cursor");
	}
	which = !which;
	cursor.handle = cursors[which].handle;
	return ioctl(card, DRM_IOCTL_MODE_CURSOR, &cursor);
}

static int cursor_move(void)
{
	static int x;
	struct drm_mode_cursor cursor = { .flags = DRM_MODE_CURSOR_MOVE, .crtc_id = crtc };

	x = (x + 1) % 256;
	cursor.x = cursor.y = x;
	return ioctl(card, DRM_IOCTL_MODE_CURSOR, &cursor);
}

static int test_only(void)
{
	uint64_t fb = frames[!shown].fb;

	return commit(plane, 1, &props.fb_id, &fb, DRM_MODE_ATOMIC_TEST_ONLY);
}

static int dumb(uint32_t width, uint32_t height)
{
	struct buffer buffer;
	uint8_t *start;

	if (create_dumb(&buffer, width, height))
		return -1;
	start = map_dumb(&buffer);
	if (!start)
		return -1;
	munmap(start, buffer.size);
	return destroy_dumb(&buffer);
}

static int dumb_large(void)
{
	return dumb(1024, 768);
}

static int dumb_small(void)
{
	return dumb(64, 64);
}

static int prime_export(void)
{
	struct drm_prime_handle prime = { .handle = frames[0].handle, .flags = DRM_CLOEXEC };

	if (ioctl(card, DRM_IOCTL_PRIME_HANDLE_TO_FD, &prime))
		return -1;
	return close(prime.fd);
}

static int prime_import(void)
{
	static int other = -1, exported = -1;
	struct drm_prime_handle prime = {};
	struct drm_gem_close gem_close = {};

	if (other < 0) {
		struct drm_prime_handle first = { .handle = frames[0].handle, .flags = DRM_CLOEXEC };

		if (ioctl(card, DRM_IOCTL_PRIME_HANDLE_TO_FD, &first))
			return -1;
		exported = first.fd;
		other = open("/dev/dri/card0", O_RDWR | O_CLOEXEC);
	}
	prime.fd = exported;
	if (ioctl(other, DRM_IOCTL_PRIME_FD_TO_HANDLE, &prime))
		return -1;
	gem_close.handle = prime.handle;
	return ioctl(other, DRM_IOCTL_GEM_CLOSE, &gem_close);
}

static int modeset_off_on(void)
{
	if (set_crtc(0))
		return -1;
	return set_crtc(frames[shown].fb);
}

static int get_connector(void)
{
	struct drm_mode_get_connector get = { .connector_id = connector };

	/* Room for no modes asks the driver to look anew. */
	return ioctl(card, DRM_IOCTL_MODE_GETCONNECTOR, &get);
}

static const struct operation {
	const char *name;
	int (*run)(void);
	int count;
} operations[] = {
	{ "flip_blocking", flip_blocking, 64 },
	{ "flip_event", flip_event, 64 },
	{ "flip_legacy", flip_legacy, 64 },
	{ "dirtyfb_full", dirty_full, 64 },
	{ "dirtyfb_64x64", dirty_small, 64 },
	{ "dirtyfb_8_rects", dirty_eight, 64 },
	{ "cursor_image", cursor_image, 64 },
	{ "cursor_move", cursor_move, 64 },
	{ "test_only", test_only, 256 },
	{ "dumb_1024x768", dumb_large, 16 },
	{ "dumb_64x64", dumb_small, 64 },
	{ "prime_export", prime_export, 256 },
	{ "prime_import", prime_import, 256 },
	{ "modeset_off_on", modeset_off_on, 32 },
	{ "getconnector", get_connector, 16 },
};

static uint64_t clock_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * UINT64_C(1000000000) + now.tv_nsec;
}

static void measure(const struct operation *operation, int warm_up)
{
	uint64_t start, end;

	for (int i = 0; i < warm_up; i++) {
		if (operation->run()) {
			printf("skipped %s %s\n", operation->name, strerror(errno));
			return;
		}
	}
	usleep(SETTLE_US);
	start = clock_ns();
	MARK(MARKER_START);
	for (int i = 0; i < operation->count; i++) {
		if (operation->run())
			die("%s, time %d", operation->name, i);
	}
	MARK(MARKER_STOP);
	end = clock_ns();
	usleep(SETTLE_US);
	MARK(MARKER_SETTLED);
	printf("measured %s %d %llu\n", operation->name, operation->count, (unsigned long long)(end - start));
}

static uint32_t find_property(uint32_t object, uint32_t type, const char *name, uint64_t *value)
{
	uint32_t ids[64];
	uint64_t values[64];
	struct drm_mode_obj_get_properties get = {
		.props_ptr = (uintptr_t)ids,
		.prop_values_ptr = (uintptr_t)values,
		.count_props = 64,
		.obj_id = object,
		.obj_type = type,
	};

	check(ioctl(card, DRM_IOCTL_MODE_OBJ_GETPROPERTIES, &get), "OBJ_GETPROPERTIES");
	for (uint32_t i = 0; i < get.count_props; i++) {
		struct drm_mode_get_property property = { .prop_id = ids[i] };

		check(ioctl(card, DRM_IOCTL_MODE_GETPROPERTY, &property), "GETPROPERTY");
		if (!strcmp(property.name, name)) {
			if (value)
				*value = values[i];
			return ids[i];
		}
	}
	errno = ENOENT;
	die("property %s", name);
}

static void find_plane(void)
{
	uint32_t ids[16];
	struct drm_mode_get_plane_res planes = { .plane_id_ptr = (uintptr_t)ids, .count_planes = 16 };

	check(ioctl(card, DRM_IOCTL_MODE_GETPLANERESOURCES, &planes), "GETPLANERESOURCES");
	for (uint32_t i = 0; i < planes.count_planes; i++) {
		struct drm_mode_get_plane get = { .plane_id = ids[i] };
		uint64_t type;

		check(ioctl(card, DRM_IOCTL_MODE_GETPLANE, &get), "GETPLANE");
		find_property(ids[i], DRM_MODE_OBJECT_PLANE, "type", &type);
		/* Type 1 is the primary plane. */
		if (type == 1 && get.possible_crtcs & 1) {
			plane = ids[i];
			props.fb_id = find_property(plane, DRM_MODE_OBJECT_PLANE, "FB_ID", NULL);
			return;
		}
	}
	errno = ENODEV;
	die("the primary plane");
}

/* Opens the card, and takes its first connector and CRTC. */
static void open_card(void)
{
	struct drm_set_client_cap universal = { DRM_CLIENT_CAP_UNIVERSAL_PLANES, 1 };
	struct drm_set_client_cap atomic = { DRM_CLIENT_CAP_ATOMIC, 1 };
	uint32_t connectors[16], crtcs[16];
	struct drm_mode_card_res resources = {
		.connector_id_ptr = (uintptr_t)connectors,
		.crtc_id_ptr = (uintptr_t)crtcs,
		.count_connectors = 16,
		.count_crtcs = 16,
	};

	card = open("/dev/dri/card0", O_RDWR | O_CLOEXEC);
	check(card, "/dev/dri/card0");
	check(ioctl(card, DRM_IOCTL_SET_CLIENT_CAP, &universal), "universal planes");
	check(ioctl(card, DRM_IOCTL_SET_CLIENT_CAP, &atomic), "atomic");
	check(ioctl(card, DRM_IOCTL_MODE_GETRESOURCES, &resources), "GETRESOURCES");
	if (!resources.count_connectors || !resources.count_crtcs) {
		errno = ENODEV;
		die("outputs");
	}
	connector = connectors[0];
	crtc = crtcs[0];
	find_plane();
}

/* A mode of this size, at about 60 Hz. */
static void make_mode(uint32_t width, uint32_t height)
{
	mode = (struct drm_mode_modeinfo){
		.hdisplay = width, .hsync_start = width + 16, .hsync_end = width + 32, .htotal = width + 64,
		.vdisplay = height, .vsync_start = height + 4, .vsync_end = height + 8, .vtotal = height + 16,
		.vrefresh = 60,
	};
	mode.clock = mode.htotal * mode.vtotal * 60 / 1000;
	snprintf(mode.name, sizeof(mode.name), "%ux%u", width, height);
}

static void run_operations(void)
{
	make_mode(1024, 768);
	for (int i = 0; i < 2; i++) {
		check(create_dumb(&frames[i], mode.hdisplay, mode.vdisplay), "creating a frame");
		draw(&frames[i], i + 1);
		add_fb(&frames[i]);
	}
	check(set_crtc(frames[0].fb), "SETCRTC");
	for (size_t i = 0; i < sizeof(operations) / sizeof(operations[0]); i++)
		measure(&operations[i], WARM_UP);
}

static int suspend_and_resume(void)
{
	int state = open("/sys/power/state", O_WRONLY);
	int result = state < 0 || write(state, "mem", 3) != 3 ? -1 : 0;

	close(state);
	return result;
}

/* Suspends and resumes the devices, so many times, while this many buffers of 1 MiB are alive, of which the first is on the screen. */
static void run_suspend(int buffers, int times)
{
	const struct operation operation = { "suspend", suspend_and_resume, 1 };

	make_mode(512, 512);
	for (int i = 0; i < buffers; i++) {
		struct buffer buffer;

		check(create_dumb(&buffer, mode.hdisplay, mode.vdisplay), "creating a buffer");
		if (i == 0)
			frames[0] = buffer;
	}
	draw(&frames[0], 1);
	add_fb(&frames[0]);
	check(set_crtc(frames[0].fb), "SETCRTC");
	/* What is on the screen is looked at from the outside, before and after. */
	printf("before\n");
	getchar();
	for (int i = 0; i < times; i++) {
		measure(&operation, 0);
		getchar();
	}
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc == 2 && !strcmp(argv[1], "operations")) {
		open_card();
		run_operations();
	} else if (argc == 4 && !strcmp(argv[1], "suspend")) {
		open_card();
		run_suspend(atoi(argv[2]), atoi(argv[3]));
	} else {
		fprintf(stderr, "usage: virtgpu-bench operations | suspend BUFFERS TIMES\n");
		return 1;
	}
	return 0;
}
