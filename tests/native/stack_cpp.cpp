/*
 * stack_cpp.cpp: stacks of C++ compared with libgcc's: templates, virtual calls, lambdas, exceptions thrown through
 * frames and caught (captures in destructors and handlers run while the exception unwinds), rethrow, thread_local
 * destructors, std::sort, std::function, coroutine-free.
 */
#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "stack_test.h"

static volatile unsigned sink;

struct Guard {
    unsigned level;
    explicit Guard(unsigned l) : level(l) { stack_here(); }
    ~Guard() { stack_here(); sink = sink + level; }
};

template <unsigned N> struct Nest {
    static __attribute__((noinline)) void go(unsigned fail)
    {
        Guard guard(N);
        if (N == fail)
            throw std::runtime_error("thrown at " + std::to_string(N));
        Nest<N - 1>::go(fail);
        sink = sink + N;
    }
};
template <> struct Nest<0> {
    static __attribute__((noinline)) void go(unsigned) { stack_here(); }
};

struct Shape {
    virtual ~Shape() = default;
    virtual void visit(unsigned left) = 0;
};
struct Round : Shape {
    std::vector<int> payload = std::vector<int>(16, 1);
    void visit(unsigned left) override;
};
struct Square : Shape {
    alignas(64) char room[64] = {};
    void visit(unsigned left) override;
};
static std::unique_ptr<Shape> make(unsigned which)
{
    if (which % 2)
        return std::make_unique<Round>();
    return std::make_unique<Square>();
}
void Round::visit(unsigned left)
{
    stack_here();
    if (left)
        make(left)->visit(left - 1);
}
void Square::visit(unsigned left)
{
    room[left % 64] = 1;
    stack_here();
    if (left) {
        auto next = [&, copy = *this](unsigned n) mutable { copy.room[0]++; make(n)->visit(n - 1); stack_here(); };
        std::function<void(unsigned)> call = next;
        call(left);
    }
}

static void exceptions()
{
    for (unsigned round = 0; round < 40; round++) {
        try {
            try {
                Nest<24>::go(round % 30);
            } catch (const std::runtime_error &) {
                stack_here();
                throw;
            }
        } catch (const std::exception &error) {
            stack_here();
            sink = sink + (unsigned)std::string(error.what()).size();
        }
    }
}

struct AtThreadEnd { ~AtThreadEnd() { stack_here(); } };
static thread_local AtThreadEnd at_thread_end;

int main()
{
    stack_test_init(128);
    for (unsigned round = 0; round < 20; round++) {
        exceptions();
        make(round)->visit(round);
        std::vector<std::string> words;
        for (unsigned i = 0; i < 30; i++)
            words.push_back(std::to_string(i * 7919 % 31));
        std::sort(words.begin(), words.end(), [](const std::string &a, const std::string &b) { stack_here(); return a < b; });
        std::thread other([] { (void)&at_thread_end; exceptions(); });
        other.join();
    }
    return stack_test_report();
}
