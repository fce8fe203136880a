// Rows that are not copied are asked for one query ahead, in place of when they are needed.
// in multiscale_cpu.h
                for (int c = 0; c < d; c++) g[c] = A(from[c]);
// write
                for (int c = 0; c < d; c++) g[c] = A(from[c]);
                if (!copied && i + 1 < queries)
                    for (int r = 0; r < 4; r++) for (int j = (i + 1) * lk; j < (i + 2) * lk; j++) {
                        prefetch(maps.value + look.row[r * m + j], d);
                        prefetch(maps.grad + grad_row[r * m + j], d);
                    }
