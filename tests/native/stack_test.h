/* stack_test.h: what stack_host.c gives the test programs. */
#ifndef STACK_TEST_H
#define STACK_TEST_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Before anything else; max_depth as in stack_init. */
void stack_test_init(unsigned max_depth);
/* Captures the caller's stack, compares it with libgcc's, and gives the node. */
uint32_t stack_here(void);
/* Captures without comparing (where libgcc would not be right, or too slow). */
uint32_t stack_only(void);
/* libgcc's unwinder: the return addresses from here on; gives how many. */
unsigned stack_test_unwind(void **ips, unsigned limit);
/* Prints the counts; 0 if nothing differed. */
int stack_test_report(void);

#ifdef __cplusplus
}
#endif
#endif
