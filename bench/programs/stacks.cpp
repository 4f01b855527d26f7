// stacks: very many distinct call stacks, chosen uniformly, so that remembering stacks does not help.
// usage: stacks ALLOCATIONS [PATHS, by default 43000]
// Stack: main -> run -> 12 levels of calls, each to one of eight functions that have frames of different sizes -> leaf
//        -> malloc, and free of the block that a random slot held. A path's number, scrambled, chooses the eight
//        functions of its six upper or its six lower levels in turn; the other six are always the same.
// So there are PATHS distinct stacks of malloc and as many of free. Build: -O2 -fomit-frame-pointer -g.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

static constexpr uint32_t SLOTS = 20000;
static constexpr int LEVELS = 12, WIDTH = 8;
static void *slots[SLOTS];
static uint64_t state = 88172645463325252ull, mallocs, frees, sink;

static inline uint64_t next() {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

__attribute__((noinline)) static void leaf(uint64_t random) {
  void *&slot = slots[random % SLOTS];
  if (slot) {
    free(slot);
    frees++;
  }
  slot = malloc(16 + (random >> 32) % 240);
  mallocs++;
  *static_cast<char *>(slot) = 1;
  asm volatile("" ::: "memory");
}

typedef void Step(uint64_t path, uint64_t random);
template <int L, int W> struct Level { static Step go; };
template <int L> struct Table { static Step *const steps[WIDTH]; };
template <int L> Step *const Table<L>::steps[WIDTH] = {Level<L, 0>::go, Level<L, 1>::go, Level<L, 2>::go,
  Level<L, 3>::go, Level<L, 4>::go, Level<L, 5>::go, Level<L, 6>::go, Level<L, 7>::go};

template <int L, int W> __attribute__((noinline)) void Level<L, W>::go(uint64_t path, uint64_t random) {
  volatile char frame[24 + 16 * W];
  frame[0] = static_cast<char>(W);
  if constexpr (L + 1 == LEVELS)
    leaf(random);
  else  // The path's bit 0 says which half of the levels its other 18 bits are for.
    Table<L + 1>::steps[(path & 1) == (L + 1 < LEVELS / 2) ? path >> (1 + 3 * ((L + 1) % 6)) & 7 : 0](path, random);
  sink += frame[0];
}

__attribute__((noinline)) static void run(uint64_t allocations, uint64_t paths) {
  while (mallocs < allocations) {
    uint64_t random = next(), path = random % paths;
    // An odd factor makes the numbers below 2^19 change places, so that neighbours differ at every level.
    path = path * 0x5bd1ull & ((1 << 19) - 1);
    Table<0>::steps[path & 1 ? path >> 1 & 7 : 0](path, next());
  }
}

int main(int argc, char **argv) {
  run(argc > 1 ? strtoull(argv[1], nullptr, 10) : 2000000, argc > 2 ? strtoull(argv[2], nullptr, 10) : 43000);
  fprintf(stderr, "stacks: %lu malloc, %lu free, %lu\n", mallocs, frees, sink & 1);
}
