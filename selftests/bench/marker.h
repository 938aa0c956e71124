/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Marks in the guest's code that the plugin sees: a nop with an operand that no compiler makes.
 */

#define MARKER_START	1	/* a measurement begins */
#define MARKER_STOP	2	/* it ends */
#define MARKER_SETTLED	3	/* and what it set off has ended as well */

/* nopl 0xnn5567b0(%rax,%rax,1), of which nn is the marker's number */
#define MARKER_BYTES	0x0f, 0x1f, 0x84, 0x00, 0xb0, 0x67, 0x55
#define MARKER_SIZE	8

#define MARKER_STRING_(...)	#__VA_ARGS__
#define MARKER_STRING(...)	MARKER_STRING_(__VA_ARGS__)
#define MARK(number)		asm volatile(".byte " MARKER_STRING(MARKER_BYTES) ", " MARKER_STRING(number) ::: "memory")
