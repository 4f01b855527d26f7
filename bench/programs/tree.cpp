// tree: a binary tree is built and torn down by recursion, each node from a call stack of its own.
// usage: tree [DEPTH, by default 17] [ROUNDS, by default 10]
// Stack: main -> one return address for each turn to the left or right on the way to the node -> malloc or free.
// A tree of depth 17 has 131,071 nodes: as many distinct stacks of malloc and as many of free, 1 to 17 frames deep.
// Build: -O2 -fomit-frame-pointer -g.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

struct Node {
  Node *left, *right;
  uint64_t key;
};
static uint64_t nodes;

// Each call has its own return address; what follows it keeps it from being a jump or one loop.
__attribute__((noinline)) static Node *build(int depth, uint64_t key) {
  if (depth == 0) return nullptr;
  Node *node = static_cast<Node *>(malloc(sizeof(Node) + key % 5 * 16));
  node->key = key;
  nodes++;
  node->left = build(depth - 1, key * 2);
  asm volatile("" ::: "memory");
  node->right = build(depth - 1, key * 2 + 1);
  asm volatile("" ::: "memory");
  return node;
}

__attribute__((noinline)) static uint64_t tear_down(Node *node) {
  if (!node) return 0;
  uint64_t sum = tear_down(node->left);
  asm volatile("" ::: "memory");
  sum += tear_down(node->right) + node->key;
  free(node);
  asm volatile("" ::: "memory");
  return sum;
}

int main(int argc, char **argv) {
  int depth = argc > 1 ? atoi(argv[1]) : 17, rounds = argc > 2 ? atoi(argv[2]) : 10;
  uint64_t sum = 0;
  for (int i = 0; i < rounds; i++) sum += tear_down(build(depth, 1));
  fprintf(stderr, "tree: %lu nodes, %lu\n", nodes, sum);
}
