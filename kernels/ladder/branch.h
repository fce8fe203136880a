// A branch for a pixel outside the map, in place of a row of zeros.
// in multiscale_cpu.h
                sum[0][v] += share[j] * load<W>(one + v * W);
                sum[1][v] += share[j + m] * load<W>(two + v * W);
// write
                if (row[j] != INT64_MIN) sum[0][v] += share[j] * load<W>(one + v * W);
                if (row[j + m] != INT64_MIN) sum[1][v] += share[j + m] * load<W>(two + v * W);
// in multiscale_cpu.h
        look(points + i * m * 2, weights + i * m, o.stride_s, distance(image, zeros.data()));
// write
        look(points + i * m * 2, weights + i * m, o.stride_s, INT64_MIN);
