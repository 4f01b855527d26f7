/* loader.h: dlopen and its kin. */
#ifndef HEAPLEDGER_LOADER_H
#define HEAPLEDGER_LOADER_H

/* At the program's start: what is loaded now is in the global scope. Takes the loader's list lock. */
void loader_note_start(void);

#endif
