/* image.h: one process image (a program since its exec, or a fork child since its fork) and its life. */
#ifndef HEAPLEDGER_IMAGE_H
#define HEAPLEDGER_IMAGE_H

#include <sys/types.h>

#include "host.h"
#include "record.h"

enum hl_mode {
    HL_MODE_NEW = 0, /* nothing made yet; also what a fork child finds, because this memory is wiped by fork */
    HL_MODE_ON = 1,
    HL_MODE_OFF = 2 /* pass-through: never started, stopped, or past the end */
};

#define HL_SEGMENTS 4096

/* All that belongs to this image only. Lies in memory that fork wipes, so a child can never write into it. */
struct hl_image {
    uint32_t mode;         /* enum hl_mode */
    uint32_t live;         /* 1 while recording: what hl_live points to */
    uint32_t start_lock;   /* making the image */
    uint32_t ring_lock;    /* making and taking rings */
    uint32_t segment_lock; /* making stack segments */
    uint32_t module_lock;  /* the module table and the log */
    uint32_t file_lock;    /* spool.c's static buffers; the innermost one */
    uint32_t ended;        /* the hold was begun */
    int pid;
    uint32_t number; /* N of the folder PID.N */
    uint32_t threads;
    uint32_t left;    /* image_leave has made its provisions */
    uint32_t remarks; /* lines about children that will not be seen */
    char folder[3584]; /* of this image, with a slash at the end */
};

extern HL_HIDDEN struct hl_image *hl_image;

/* What the environment said; read once, inherited by fork. */
struct hl_settings {
    bool ready;
    bool enabled;
    bool quiet;
    bool left; /* image_leave has been called here or in a parent: files of ours may be out of reach */
    bool free_stacks;
    uint64_t sample_bytes; /* 0: all is recorded */
    uint64_t sample_seed;
    uint32_t hold_ms;
    uint32_t ring_slots;
    uint32_t depth;
    char spool[3072];
};

extern HL_HIDDEN struct hl_settings hl_settings;

/* Makes the image if there is none in this process yet. True when recording is on. Any thread; slow. */
bool image_start(void);

/* Stops recording for good: state, reason, a line in the log and one on stderr. The program runs on. */
void image_stop(enum hl_stop reason, int error, const char *text);

/*
 * The program is about to forbid itself, on pain of death, what we need for files only: what can be made before is made, and then
 * this image goes on without them. Its children, and what they or it exec, are not recorded.
 */
void image_forbid_files(void);

/*
 * The program is about to forbid itself what we need, on pain of death: recording stops, and from here on the shim makes no
 * system call any more, in this process, its fork children and what they exec.
 */
void image_confine(void);

/*
 * The program is about to put the spool out of its own reach (another user, another root, no more files): what recording needs for a
 * while is made while it can be. Once an image.
 */
void image_leave(void);

/* True in a vfork child, which runs in its parent's memory: nothing may be held or ended there. */
bool image_is_borrowed(void);

/* Records the end and waits until the collector has looked, at most hold_ms. how: 0 exit, 1 _exit, 2 quick_exit, 3 exec. */
void image_hold(uint32_t how, int status);

/* The exec that image_hold(3, ..) announced has failed: the program goes on. */
void image_resume(void);

/* Around the real fork: image_fork_parent before it, then one of the others. */
void image_fork_before(void);
void image_fork_child(void);
void image_fork_parent(pid_t child);

#endif
