/* spool_files.h: making and mapping the files of an image's folder. All slow paths; none allocates or touches errno. */
#ifndef HEAPLEDGER_SPOOL_FILES_H
#define HEAPLEDGER_SPOOL_FILES_H

#include "image.h"

#define HL_PATH 3712
#define HL_NO_SEGMENT ((struct hl_node *)-1)
#define HL_SEGMENT_BYTES (HL_SEGMENT_NODES * sizeof(struct hl_node))
#define HL_STACKS_FULL "S\tno room for more call stacks\n"

/* Copies `text` with its end mark, cut to `room`. Returns the characters written, without the end mark. */
size_t text_put(char *at, size_t room, const char *text);
size_t text_put_number(char *at, size_t room, uint64_t value, unsigned base);

/* Makes SPOOL/PID.N with the first free N and notes both in the image. Returns 0 or -errno. */
int spool_make_folder(struct hl_image *image);

/*
 * Makes the file name+number+".new" with all its blocks allocated and maps it. NULL and *error on failure (no file is left).
 * The caller fills in the header and then calls spool_publish, which gives the file its real name.
 */
void *spool_make(const char *name, int64_t number, size_t bytes, int *error);
int spool_publish(const char *name, int64_t number);

/* Appends to a text file, as far as possible; failures are not reported. */
void spool_append(const char *name, const char *text, size_t bytes);

/* In a fork child: the parent's stack segments are forgotten, and their places become memory of the child's own. */
void spool_forget(void);

/* Copies a file of /proc into the folder, as far as possible. */
void spool_copy(const char *from, const char *name);

#endif
