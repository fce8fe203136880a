// One chain of sums, in place of two in turn.
// in multiscale_cpu.h
    V<A, W> sum[2][NV];                      // two sums in turn: an addition waits for the one before it
    for (int v = 0; v < NV; v++) sum[0][v] = sum[1][v] = V<A, W>{};
    for (int i = 0; i < 4; i += 2, row += 2 * m, share += 2 * m)
        for (int j = 0; j < lk; j++) {
            const T *one = value + row[j], *two = value + row[j + m];
            for (int v = 0; v < NV; v++) {
                sum[0][v] += share[j] * load<W>(one + v * W);
                sum[1][v] += share[j + m] * load<W>(two + v * W);
            }
        }
    for (int v = 0; v < NV; v++) store<W>(out + v * W, sum[0][v] + sum[1][v]);
// write
    V<A, W> sum[NV];
    for (int v = 0; v < NV; v++) sum[v] = V<A, W>{};
    for (int i = 0; i < 4; i++, row += m, share += m)
        for (int j = 0; j < lk; j++)
            for (int v = 0; v < NV; v++) sum[v] += share[j] * load<W>(value + row[j] + v * W);
    for (int v = 0; v < NV; v++) store<W>(out + v * W, sum[v]);
