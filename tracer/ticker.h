/*
 * ticker.h: a thread that shows every followed process that we are there, and what time it roughly is.
 *
 * It writes control.heartbeat_ns and raises control.coarse (preload/spool.h) in each page it was given, once a millisecond,
 * and every four while no process does anything (the first event after that still finds a new millisecond). It
 * takes no lock of the caller's, holds no page longer than ticker_remove needs to say so, and ends with the process.
 */
#ifndef HEAPLEDGER_TICKER_H
#define HEAPLEDGER_TICKER_H

#include "../preload/spool.h"

/* Begins to write to this page; starts the thread if need be. 0, or an errno: nothing is written then. */
int ticker_add(struct hl_control *);

/* Nothing is written to this page any more when it returns. Does nothing for one that was not added. */
void ticker_remove(struct hl_control *);

#endif
