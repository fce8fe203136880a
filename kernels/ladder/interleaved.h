// A row of values and the row of its gradients side by side, in place of two arrays.
// in multiscale_cpu.h
            const int64_t size = ((s + 1) * d + 15) / 16 * 16;      // whole cache lines
            room.assign(2 * size + 64 / sizeof(A), 0);
// write
            room.assign(2 * (s + 1) * d + 64 / sizeof(A), 0);
// in multiscale_cpu.h
for (int c = 0; c < d; c++) from[i * d + c] = A(map[i * o.stride_s + c]);
            value = from; grad = from + size; stride = d; outside = grad_outside = s * d;
// write
for (int c = 0; c < d; c++) from[2 * i * d + c] = A(map[i * o.stride_s + c]);
            value = from; grad = from + d; stride = 2 * d; outside = grad_outside = 2 * s * d;
// in multiscale_cpu.h
T(grad[i * o.d + c])
// write
T(grad[i * stride + c])
