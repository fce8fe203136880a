// The CPU kernels. isa.h includes this file once for each instruction set, inside a namespace of its own, with LANES, the
// floats that a vector register of that set holds. Hence no include guard.

#include "vectors.h"
#include "exp.h"

template <typename A> constexpr int WIDTH = LANES * sizeof(float) / sizeof(A);   // numbers in a register

// region product
// c[i][x] += the sum over k of a[i][k] * b[k][x], for M rows and N vectors of columns, held in registers.
template <int M, int N, int W, typename A>
void block(const A* a, int64_t ai, int64_t ak, const A* b, int64_t bk, int count, A* c, int64_t ci) {
    V<A, W> sum[M][N];
    #pragma GCC unroll 16
    for (int i = 0; i < M; i++)
        #pragma GCC unroll 4
        for (int x = 0; x < N; x++) sum[i][x] = load<W>(c + i * ci + x * W);
    for (int k = 0; k < count; k++, a += ak, b += bk) {
        V<A, W> right[N];
        #pragma GCC unroll 4
        for (int x = 0; x < N; x++) right[x] = load<W>(b + x * W);
        #pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            const A left = a[i * ai];
            #pragma GCC unroll 4
            for (int x = 0; x < N; x++) sum[i][x] += left * right[x];
        }
    }
    #pragma GCC unroll 16
    for (int i = 0; i < M; i++)
        #pragma GCC unroll 4
        for (int x = 0; x < N; x++) store<W>(c + i * ci + x * W, sum[i][x]);
}

// All rows: as many blocks of M as fit, then half as many rows at a time, down to one.
template <int M, int N, int W, typename A>
void rows_of(const A* a, int64_t ai, int64_t ak, const A* b, int64_t bk, int count, A* c, int64_t ci, int rows) {
    int i = 0;
    for (; i + M <= rows; i += M) block<M, N, W>(a + i * ai, ai, ak, b, bk, count, c + i * ci, ci);
    if constexpr (M > 1) if (i < rows) rows_of<M / 2, N, W>(a + i * ai, ai, ak, b, bk, count, c + i * ci, ci, rows - i);
}
template <typename A>
void product(const A* a, int64_t ai, int64_t ak, const A* b, int64_t bk, int count, A* c, int64_t ci, int rows, int vectors) {
    constexpr int W = WIDTH<A>, M = LANES == 16 ? 8 : 4;
    int x = 0;
    for (; x + 2 <= vectors; x += 2) rows_of<M, 2, W>(a, ai, ak, b + x * W, bk, count, c + x * W, ci, rows);
    if (x < vectors) rows_of<M, 1, W>(a, ai, ak, b + x * W, bk, count, c + x * W, ci, rows);
}
// endregion product

// region tile
// Queries are taken in tiles: some rows of the map, or a piece of one. They follow each other in memory.
constexpr int TILE = 128, KEYS = 64, LINE = TILE + 16, RIM = 16;    // queries and keys at a time; numbers from key to key

struct Tile { int row, rows, column, columns, count; int64_t first; };
struct Tiles {
    int h, w, rows, columns, across;
    int64_t count;
    explicit Tiles(const Problem& o) : h(o.h), w(o.w) {
        across = (w + TILE - 1) / TILE;
        columns = across == 1 ? w : ((w + across - 1) / across + 15) / 16 * 16;
        across = (w + columns - 1) / columns;
        rows = std::min(h, std::max(1, across > 1 ? 1 : TILE / w));
        count = int64_t((h + rows - 1) / rows) * across;
    }
    Tile operator()(int64_t i) const {
        const int row = int(i / across) * rows, column = int(i % across) * columns;
        const int some = std::min(rows, h - row), wide = std::min(columns, w - column);
        return {row, some, column, wide, some * wide, int64_t(row) * w + column};
    }
};

// Numbers on a boundary of the cache's lines, zeros at first.
template <typename A>
struct Room {
    std::vector<A> all;
    A* at = nullptr;
    void take(size_t count) {
        all.assign(count + 64 / sizeof(A), A(0));
        at = all.data() + (64 - (uintptr_t)all.data() % 64) % 64 / sizeof(A);
    }
};
// endregion tile

// region copies
// to[c][i] = the d channels c of some queries, times `scale`; zeros up to a whole vector.
template <typename T, typename A>
void channels_first(const T* from, int64_t si, int64_t sd, int count, int d, A scale, A* to) {
    const int padded = (count + WIDTH<A> - 1) / WIDTH<A> * WIDTH<A>;
    for (int c = 0; c < d; c++, to += LINE) {
        const T* line = from + c * sd;
        if (si == 1) for (int i = 0; i < count; i++) to[i] = A(line[i]) * scale;
        else for (int i = 0; i < count; i++) to[i] = A(line[i * si]) * scale;
        for (int i = count; i < padded; i++) to[i] = 0;
    }
}
// to[i][c] = from[c][i], with `wide` numbers from i to i.
template <typename A>
void turned(const A* from, int count, int d, A* to, int wide) {
    for (int c = 0; c < d; c++) for (int i = 0; i < count; i++) to[i * wide + c] = from[c * LINE + i];
}

// Keys or values of one head, KEYS at a time, in the order in which they lie in memory.
template <typename A>
struct Packed {
    Room<A> room;
    int64_t key, channel;
    int d;
    template <typename T> void take(const T* from, int64_t si, int64_t sd, int64_t count, int channels) {
        d = channels;
        const bool by_key = sd == 1 && si != 1;
        key = by_key ? d : 1; channel = by_key ? 1 : KEYS;
        room.all.resize((count + KEYS - 1) / KEYS * KEYS * d + 64 / sizeof(A));
        room.at = room.all.data() + (64 - (uintptr_t)room.all.data() % 64) % 64 / sizeof(A);
        for (int64_t k = 0; k < count; k += KEYS) {
            const int some = std::min<int64_t>(KEYS, count - k);
            A* to = room.at + k * d;
            if (by_key) for (int i = 0; i < some; i++) for (int c = 0; c < d; c++) to[i * d + c] = A(from[(k + i) * si + c]);
            else if (si == 1) for (int c = 0; c < d; c++) for (int i = 0; i < some; i++) to[c * KEYS + i] = A(from[k + i + c * sd]);
            else for (int c = 0; c < d; c++) for (int i = 0; i < some; i++) to[c * KEYS + i] = A(from[(k + i) * si + c * sd]);
        }
    }
    const A* operator()(int64_t k) const { return room.at + k * d; }   // of a block that begins at key k
};
// endregion copies

// region table
// One head's table with a rim of zeros, wide enough for all that a tile reads beside it.
template <typename A>
struct Table {
    int th, tw, beside;
    int64_t stride;
    Room<A> room;
    A* zero;                                               // its number (0, 0)
    void size(const Problem& o, int columns) {
        th = o.th; tw = o.tw; beside = columns + RIM + 8;
        stride = (tw + 2 * beside + 15) / 16 * 16;
        room.take((th + 4) * stride);
        zero = room.at + 2 * stride + beside;
    }
    void take(const A* from) { for (int y = 0; y < th; y++) std::copy_n(from + int64_t(y) * tw, tw, zero + y * stride); }
    A* row(int y) const { return zero + y * stride; }
};
// endregion table

// region where
// Where the keys of a block are read by the queries of a tile: for columns the origin, for rows the place itself.
template <typename A>
struct Where {
    std::vector<Origin<A>> across;
    std::vector<int> low;                                  // of key j and the tile's row r: j * rows + r
    std::vector<A> share;
    Where() : across(KEYS), low(KEYS * TILE), share(KEYS * TILE) {}
    void take(const Problem& o, const Tile& t, const A* start, int keys) {
        int* lows = low.data();
        A* shares = share.data();
        const A more = A(o.more_y);
        const int first = t.row, rows = t.rows, th = o.th;
        for (int j = 0; j < keys; j++) {
            across[j] = origin(start[2 * j]);
            const Origin<A> down = origin(start[2 * j + 1]);
            #pragma GCC ivdep
            for (int r = 0; r < rows; r++) {
                const Place<A> p = place(down, more, first + r, th);
                lows[j * rows + r] = p.low; shares[j * rows + r] = p.share;
            }
        }
    }
};
// endregion where

// region across
// W queries side by side, beginning with number x of the tile's row, read a row of the table. TAPS 2: the same two shares for
// all. TAPS 3: steps are a little short, so each has its own two among three neighbours. TAPS 0: any steps, one by one.
template <int TAPS, typename A>
struct Across {
    static constexpr int W = WIDTH<A>;
    typedef V<A, W> Vec;
    const Problem& o;
    Vec count;                                             // 0, 1, 2, ...
    // for TAPS 2 and 3
    int column;
    A rest;
    Vec share[3], slope_share[3];
    // for TAPS 0
    int at[W];
    A part[W];

    explicit Across(const Problem& o) : o(o) { for (int i = 0; i < W; i++) count[i] = A(i); }
    // Shares of the TAPS numbers from column - (TAPS == 3) + x on.
    void shares(Vec x, A more, Vec* to, Vec* slopes) const {
        if constexpr (TAPS == 2) { to[0] = Vec{} + (1 - rest); to[1] = Vec{} + rest; slopes[0] = Vec{} - A(1); slopes[1] = Vec{} + A(1); }
        else {
            const Vec t = rest + 1 + more * x;
            const Vec one = Vec{} + A(1), zero = Vec{};
            const Vec low = t >= A(1) ? one : zero, f = t - low;
            to[0] = (one - f) * (one - low); to[1] = f * (one - low) + (one - f) * low; to[2] = f * low;
            slopes[0] = low - one; slopes[1] = one - 2 * low; slopes[2] = low;
        }
    }
    void take(const Where<A>& where, const Tile& t, int j, int x) {
        const Origin<A> from = where.across[j];
        const A more = A(o.more_x);
        if constexpr (TAPS) {
            const int first = from.first + t.column, least = -(t.columns + 5), most = o.tw + 2;    // beyond these all is zero
            column = (first < least ? least : first > most ? most : first) - (TAPS == 3) + x;
            rest = from.rest + more * A(t.column);
            shares(count + A(x), more, share, slope_share);
        } else for (int i = 0; i < W; i++) {
            const Place<A> p = place(from, more, t.column + x + i, o.tw);
            at[i] = p.low; part[i] = p.share;
        }
    }
    Vec three(const A* row, const Vec* s) const {
        return s[0] * load<W>(row + column) + s[1] * load<W>(row + column + 1) + s[2] * load<W>(row + column + 2);
    }
    Vec read(const A* row) const {
        if constexpr (TAPS == 2) { const Vec a = load<W>(row + column), b = load<W>(row + column + 1); return between(a, b, rest); }
        else if constexpr (TAPS == 3) return three(row, share);
        else {
            A a[W], b[W];
            for (int i = 0; i < W; i++) { a[i] = row[at[i]]; b[i] = row[at[i] + 1]; }
            return between(load<W>(a), load<W>(b), load<W>(part));
        }
    }
    Vec slope(const A* row) const {
        if constexpr (TAPS == 2) return load<W>(row + column + 1) - load<W>(row + column);
        else if constexpr (TAPS == 3) return three(row, slope_share);
        else {
            A a[W], b[W];
            for (int i = 0; i < W; i++) { a[i] = row[at[i]]; b[i] = row[at[i] + 1]; }
            return load<W>(b) - load<W>(a);
        }
    }
    // The way back of `read`. With TAPS 2 and 3 `grads` are those of W numbers of the table; with TAPS 0, of W queries.
    void give(A* row, Vec grads) const {
        if constexpr (TAPS) store<W>(row + column, load<W>(row + column) + grads);
        else for (int i = 0; i < W; i++) { row[at[i]] += (1 - part[i]) * grads[i]; row[at[i] + 1] += part[i] * grads[i]; }
    }
};
// endregion across

// region bias
// scores[j][i] = the bias of the tile's queries i for the keys j: between two rows of the table. From row to row one is kept.
template <int TAPS, typename A>
void bias(const Problem& o, const Tile& t, const Table<A>& table, const Where<A>& where, int keys, A* scores) {
    constexpr int W = WIDTH<A>;
    Across<TAPS, A> across(o);
    for (int j = 0; j < keys; j++, scores += LINE)
        for (int x = (t.columns - 1) / W * W; x >= 0; x -= W) {       // from the right: what spills over is written again
            across.take(where, t, j, x);
            const int* low = &where.low[j * t.rows];
            const A* share = &where.share[j * t.rows];
            V<A, W> upper{}, lower{};
            int last = -1000;                              // the table's row that `upper` is from
            for (int r = 0; r < t.rows; r++) {
                if (low[r] == last + 1) { upper = lower; lower = across.read(table.row(low[r] + 1)); }
                else if (low[r] != last) { upper = across.read(table.row(low[r])); lower = across.read(table.row(low[r] + 1)); }
                last = low[r];
                store<W>(scores + r * t.columns + x, between(upper, lower, share[r]));
            }
        }
}
template <typename A>
void bias(int taps, const Problem& o, const Tile& t, const Table<A>& table, const Where<A>& where, int keys, A* scores) {
    (taps == 2 ? bias<2, A> : taps == 3 ? bias<3, A> : bias<0, A>)(o, t, table, where, keys, scores);
}
// How many neighbours a row of queries reads: see `Across`.
inline int taps(const Problem& o) {
    if (o.more_x == 0 || o.w == 1) return 2;
    return o.more_x < 0 && -o.more_x * (o.w - 1) < 1 ? 3 : 0;
}
// endregion bias

// region deformed_forward
// The tiles `begin` to `end` of all images and heads.
template <typename T, typename A>
void forward(const Problem& o, const T* q, const T* k, const T* v, const A* table, const A* start, T* out, A* sums, int64_t begin, int64_t end) {
    constexpr int W = WIDTH<A>;
    const A scale = A(1 / std::sqrt(double(o.d)));
    const Tiles tiles(o);
    const int kind = taps(o);
    Table<A> around;
    Packed<A> keys, values;
    Where<A> where;
    Room<A> room;
    around.size(o, tiles.columns);
    room.take(LINE * (KEYS + 2 * o.d + 3) + RIM);
    A *scores = room.at, *queries = scores + LINE * KEYS, *sum = queries + LINE * o.d, *most = sum + LINE * o.d, *total = most + LINE;
    int64_t before = -1;
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t bn = unit / tiles.count, b = bn / o.n, n = bn % o.n;
        const Tile t = tiles(unit % tiles.count);
        if (bn != before) {
            around.take(table + n * o.th * o.tw);
            keys.take(k + b * o.sk.b + n * o.sk.n, o.sk.i, o.sk.d, o.k, o.d);
            values.take(v + b * o.sv.b + n * o.sv.n, o.sv.i, o.sv.d, o.k, o.d);
            before = bn;
        }
        channels_first(q + b * o.sq.b + n * o.sq.n + t.first * o.sq.i, o.sq.i, o.sq.d, t.count, o.d, scale, queries);
        const A* places = start + 2 * (b * o.g + n / (o.n / o.g)) * o.k;
        const int vectors = (t.count + W - 1) / W;
        std::fill_n(sum, LINE * o.d, A(0));
        std::fill_n(most, LINE, std::numeric_limits<A>::lowest());
        std::fill_n(total, LINE, A(0));
        for (int64_t k0 = 0; k0 < o.k; k0 += KEYS) {
            const int some = std::min<int64_t>(KEYS, o.k - k0);
            where.take(o, t, places + 2 * k0, some);
            bias(kind, o, t, around, where, some, scores);
            product(keys(k0), keys.key, keys.channel, queries, LINE, o.d, scores, LINE, some, vectors);
            for (int x = 0; x < vectors * W; x += W) {
                const V<A, W> old = load<W>(most + x);
                V<A, W> high = old;
                for (int j = 0; j < some; j++) { const V<A, W> s = load<W>(scores + j * LINE + x); high = s > high ? s : high; }
                const V<A, W> shrink = exponential(old - high);
                V<A, W> all = load<W>(total + x) * shrink;
                for (int j = 0; j < some; j++) {
                    const V<A, W> p = exponential(load<W>(scores + j * LINE + x) - high);
                    store<W>(scores + j * LINE + x, p);
                    all += p;
                }
                store<W>(most + x, high); store<W>(total + x, all);
                if (k0) for (int c = 0; c < o.d; c++) store<W>(sum + c * LINE + x, load<W>(sum + c * LINE + x) * shrink);
            }
            product(values(k0), values.channel, values.key, scores, LINE, some, sum, LINE, o.d, vectors);
        }
        T* to = out + bn * o.d * o.q + t.first;
        A* to_sums = sums + bn * o.q + t.first;
        for (int i = 0; i < t.count; i++) { to_sums[i] = most[i] + std::log(total[i]); total[i] = o.k ? 1 / total[i] : A(0); }
        for (int c = 0; c < o.d; c++, to += o.q) for (int i = 0; i < t.count; i++) to[i] = T(sum[c * LINE + i] * total[i]);
    }
}
// endregion deformed_forward

// region deformed_spread
// The gradient of the bias: each query gives what it got to the four numbers it read, and its key learns in which direction the
// bias grows. What rows give to one row of the table is added up in registers first.
template <int TAPS, typename A>
void spread(const Problem& o, const Tile& t, const Table<A>& table, const Table<A>& to, const Where<A>& where, int keys,
            const A* grads, A* slopes) {
    constexpr int W = WIDTH<A>;
    typedef V<A, W> Vec;
    Across<TAPS, A> across(o);
    for (int j = 0; j < keys; j++, grads += LINE, slopes += 2 * W) {
        Vec along_x = load<W>(slopes), along_y = load<W>(slopes + W);
        const int* low = &where.low[j * t.rows];
        const A* share = &where.share[j * t.rows];
        for (int x = 0; x < t.columns + (TAPS ? TAPS - 1 : 0); x += W) {
            across.take(where, t, j, x);
            const Vec place = across.count + A(x);
            Vec give[3], none[3];                          // shares of the neighbour i to the left, for what is given to one number
            if constexpr (TAPS) for (int i = 0; i < TAPS; i++) {
                Vec all[3];
                across.shares(place - A(i), A(o.more_x), all, none);
                give[i] = (place >= A(i)) & (place < A(t.columns + i)) ? all[i] : Vec{};
            }
            Vec upper{}, lower{}, upper_slope{}, lower_slope{}, here{}, below{};
            int last = -1000;
            for (int r = 0; r < t.rows; r++) {
                const A* from = grads + r * t.columns + x;
                if (low[r] != last) {
                    const bool next = low[r] == last + 1;
                    if (last > -1000) { across.give(to.row(last), here); if (!next) across.give(to.row(last + 1), below); }
                    here = next ? below : Vec{}; below = Vec{};
                    upper = next ? lower : across.read(table.row(low[r])); upper_slope = next ? lower_slope : across.slope(table.row(low[r]));
                    lower = across.read(table.row(low[r] + 1)); lower_slope = across.slope(table.row(low[r] + 1));
                    last = low[r];
                }
                Vec g = load<W>(from), given = g = place < A(t.columns) ? g : Vec{};
                along_x += g * between(upper_slope, lower_slope, share[r]);
                along_y += g * (lower - upper);
                if constexpr (TAPS) {
                    given = give[0] * load<W>(from);
                    for (int i = 1; i < TAPS; i++) given += give[i] * load<W>(from - i);
                }
                here += (1 - share[r]) * given; below += share[r] * given;
            }
            across.give(to.row(last), here); across.give(to.row(last + 1), below);
        }
        store<W>(slopes, along_x); store<W>(slopes + W, along_y);
    }
}
// endregion deformed_spread

// region sums
// What one unit of work adds up: for the keys and values of its head, for where they are read, and for the table.
inline int64_t wide(const Problem& o, int w) { return (o.d + w - 1) / w * w; }
template <typename A>
struct Sums {
    A *keys, *values, *start, *table;
    static int64_t size(const Problem& o) { return 2 * o.k * wide(o, WIDTH<A>) + 2 * o.k + int64_t(o.th) * o.tw; }
    Sums(const Problem& o, A* at)
        : keys(at), values(keys + o.k * wide(o, WIDTH<A>)), start(values + o.k * wide(o, WIDTH<A>)), table(start + 2 * o.k) {}
};
// A unit is an image, a head, and one of `parts` stretches of its queries: more than one where images and heads are few.
inline int64_t parts(const Problem& o) {
    return std::min<int64_t>(Tiles(o).count, std::max<int64_t>(1, 8 / std::max<int64_t>(1, o.b * o.n)));
}
// endregion sums

// region deformed_backward
// The units `begin` to `end`. A tile's queries belong to one unit, and all that units share goes to sums of their own.
template <typename T, typename A>
void backward(const Problem& o, const T* grad, const T* q, const T* k, const T* v, const A* table, const A* start, const T* out, const A* logs,
              T* to_q, A* to_sums, int64_t begin, int64_t end) {
    constexpr int W = WIDTH<A>;
    const A scale = A(1 / std::sqrt(double(o.d)));
    const Tiles tiles(o);
    const int kind = taps(o), d = o.d, dw = wide(o, W);
    const int64_t some_parts = parts(o);
    Table<A> around, to_around;
    Packed<A> keys, values;
    Where<A> where;
    Room<A> room, turned_room, slopes;
    around.size(o, tiles.columns);
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t bn = unit / some_parts, part = unit % some_parts, b = bn / o.n, n = bn % o.n;
        const Sums<A> to(o, to_sums + unit * Sums<A>::size(o));
        std::fill_n(to.keys, 2 * o.k * dw, A(0));
        around.take(table + n * o.th * o.tw);
        to_around.size(o, tiles.columns);
        keys.take(k + b * o.sk.b + n * o.sk.n, o.sk.i, o.sk.d, o.k, d);
        values.take(v + b * o.sv.b + n * o.sv.n, o.sv.i, o.sv.d, o.k, d);
        slopes.take(o.k * 2 * W);
        room.take(RIM + LINE * (2 * KEYS + 3 * d + 2) + RIM);
        turned_room.take(2 * TILE * dw);
        A *weights = room.at + RIM, *grads = weights + LINE * KEYS, *queries = grads + LINE * KEYS, *given = queries + LINE * d;
        A *sum = given + LINE * d, *log = sum + LINE * d, *dot = log + LINE;
        A *queries_turned = turned_room.at, *given_turned = queries_turned + TILE * dw;
        const A* places = start + 2 * (b * o.g + n / (o.n / o.g)) * o.k;
        for (int64_t i = tiles.count * part / some_parts; i < tiles.count * (part + 1) / some_parts; i++) {
            const Tile t = tiles(i);
            const int vectors = (t.count + W - 1) / W;
            const int64_t at = bn * d * o.q + t.first;
            channels_first(q + b * o.sq.b + n * o.sq.n + t.first * o.sq.i, o.sq.i, o.sq.d, t.count, d, scale, queries);
            channels_first(grad + at, 1, o.q, t.count, d, A(1), given);
            turned(queries, t.count, d, queries_turned, dw);
            turned(given, t.count, d, given_turned, dw);
            std::fill_n(sum, LINE * d, A(0)); std::fill_n(dot, LINE, A(0));
            std::fill_n(log, LINE, std::numeric_limits<A>::max());         // beyond the tile's queries all weights are zero
            for (int x = 0; x < t.count; x++) log[x] = logs[bn * o.q + t.first + x];
            for (int c = 0; c < d; c++) for (int x = 0; x < t.count; x++) dot[x] += given[c * LINE + x] * A(out[at + c * o.q + x]);
            for (int64_t k0 = 0; k0 < o.k; k0 += KEYS) {
                const int some = std::min<int64_t>(KEYS, o.k - k0);
                where.take(o, t, places + 2 * k0, some);
                bias(kind, o, t, around, where, some, weights);
                product(keys(k0), keys.key, keys.channel, queries, LINE, d, weights, LINE, some, vectors);
                for (int j = 0; j < some; j++) std::fill_n(grads + j * LINE, vectors * W, A(0));
                product(values(k0), values.key, values.channel, given, LINE, d, grads, LINE, some, vectors);
                for (int x = 0; x < vectors * W; x += W) {
                    const V<A, W> l = load<W>(log + x), mean = load<W>(dot + x);
                    for (int j = 0; j < some; j++) {
                        A *p = weights + j * LINE + x, *g = grads + j * LINE + x;
                        const V<A, W> weight = exponential(load<W>(p) - l);
                        store<W>(p, weight);
                        store<W>(g, weight * (load<W>(g) - mean));
                    }
                }
                product(weights, LINE, 1, given_turned, dw, t.count, to.values + k0 * dw, dw, some, dw / W);
                product(grads, LINE, 1, queries_turned, dw, t.count, to.keys + k0 * dw, dw, some, dw / W);
                product(keys(k0), keys.channel, keys.key, grads, LINE, some, sum, LINE, d, vectors);
                const auto spread_all = kind == 2 ? spread<2, A> : kind == 3 ? spread<3, A> : spread<0, A>;
                spread_all(o, t, around, to_around, where, some, grads, slopes.at + k0 * 2 * W);
            }
            for (int c = 0; c < d; c++) for (int x = 0; x < t.count; x++) to_q[at + c * o.q + x] = T(sum[c * LINE + x] * scale);
        }
        for (int64_t j = 0; j < 2 * o.k; j++) {
            A all = 0;
            for (int i = 0; i < W; i++) all += slopes.at[j * W + i];
            to.start[j] = all;
        }
        for (int y = 0; y < o.th; y++) std::copy_n(to_around.row(y), o.tw, to.table + int64_t(y) * o.tw);
    }
}

// The sums of all units, added in one order, always the same: of the keys and values of the heads `begin` to `end` of all images,
template <typename T, typename A>
void finish_keys(const Problem& o, const A* sums, T* to_k, T* to_v, int64_t begin, int64_t end) {
    const int64_t some = parts(o), size = Sums<A>::size(o), dw = wide(o, WIDTH<A>);
    for (int64_t bn = begin; bn < end; bn++)
        for (int two = 0; two < 2; two++) {
            const A* from = sums + bn * some * size + two * o.k * dw;
            T* to = (two ? to_v : to_k) + bn * o.d * o.k;
            for (int64_t j = 0; j < o.k; j++) for (int c = 0; c < o.d; c++) {
                A all = from[j * dw + c];
                for (int64_t p = 1; p < some; p++) all += from[p * size + j * dw + c];
                to[c * o.k + j] = T(all);
            }
        }
}
// and of the places and the tables, where `stride` units later comes the next that adds to the same numbers.
template <typename A>
void add_up(const A* from, int64_t count, int64_t stride, int64_t units, A* to, bool more = false) {
    if (!more) std::fill_n(to, count, A(0));
    for (int64_t u = 0; u < units; u++) for (int64_t i = 0; i < count; i++) to[i] += from[u * stride + i];
}
// endregion deformed_backward
