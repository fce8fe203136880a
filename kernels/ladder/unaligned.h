// The copy of the rows where malloc puts it, in place of the beginning of a cache line.
// in multiscale_cpu.h
            A* from = room.data() + (64 - (uintptr_t)room.data() % 64) / sizeof(A);
// write
            A* from = room.data();
