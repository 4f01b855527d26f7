/* A child whose first recorded call comes when its parent is dead already, as after daemon(). */
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(void)
{
    pid_t me = getpid();
    free(malloc(100));
    if (syscall(SYS_fork) != 0)
        syscall(SYS_exit_group, 4);
    while (getppid() == me)
        usleep(1000);
    free(malloc(100));
    puts("orphan");
    return 0;
}
