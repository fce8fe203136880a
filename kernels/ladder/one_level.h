// Each level by itself, without asking ahead, in place of all levels of a head together.
// in multiscale_cpu.h
        next = std::min(end, unit - l0 + o.l);
// write
        next = unit + 1;
// in multiscale_cpu.h
                prefetch(p + 2 * block * step, 2 * lk); prefetch(w + block * step, lk);
// write
// in multiscale_cpu.h
                prefetch(from + 4 * int64_t(o.n) * d, d);
// write
