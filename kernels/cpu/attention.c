/* Attention by panels of queries, with the numbers about its pattern taken while a panel lies in the cache.
 *
 * Letters: H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value, F features.
 *
 * One call works off some panels of one key/value head. A panel is `panel` neighbouring queries of every query head that shares the
 * key head, one head below the other, and all the keys that any of them sees: scores = q kT by BLAS, one sweep over each row (largest
 * score, exponentials, sums), one sweep down the columns, output = exponentials v by BLAS. Exponentials stay unnormalised, the largest
 * of a row being 1; the output and the column sums take the weight 1 / sum instead.
 *
 * Sums are shifted: with t = score - largest, sum(p t) / sum(p) loses nothing to a common offset (Milakov and
 * Gimelshein 2018 for the shifted softmax). NaN lives through every step: the clamp below returns its second operand, and comparisons
 * with NaN are false.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define BYTES 64
#define SIMD "AVX-512"
#elif defined(__AVX2__)
#define BYTES 32
#define SIMD "AVX2"
#elif defined(__AVX__)
#define BYTES 32
#define SIMD "AVX"
#elif defined(__ARM_NEON)
#define BYTES 16
#define SIMD "NEON"
#else
#define BYTES 16
#define SIMD "128 bit"
#endif
#define LANES (BYTES / 4)
#define BLOCK 512 /* scores of a row that are summed on their own: short sums lose less */
#define STRIPE 64 /* columns that are summed together; rows are padded to a multiple of it */

typedef float Floats __attribute__((vector_size(BYTES), may_alias));
typedef int32_t Ints __attribute__((vector_size(BYTES), may_alias));

/* BLAS takes its integers by address. An int64 in little-endian order reads right as 32 and as 64 bits. */
typedef void (*Gemm)(const char *, const char *, const int64_t *, const int64_t *, const int64_t *, const float *, const float *,
                     const int64_t *, const float *, const int64_t *, const float *, float *, const int64_t *);

enum { FLOAT32 = 1, FLOAT64 = 2, FLOAT16 = 3, BFLOAT16 = 4 };

/* One attention and the part of it that is worked on. Strides count elements, 0 along an axis that is broadcast; a pointer that is
 * NULL was not given or is not wanted. `Call` in run.py repeats this, field by field. */
typedef struct {
    Gemm gemm;
    int64_t heads, shared, queries, keys, width, value_width, features_width; /* shared = H / G */
    int64_t panel, tile;
    int64_t batch, group; /* which one */
    const float *q, *k, *v, *features;
    int64_t q_head, q_row, q_column, k_row, v_row, features_head; /* k, v and features lie densely along their last axis */
    const float *head_scale, *gate, *sink; /* [H] */
    const int32_t *first, *stop;           /* [Q] */
    double softcap;                        /* 0 for none */
    const void *bias;
    int64_t bias_dtype, bias_head, bias_row, bias_key;
    const uint8_t *mask;
    int64_t mask_head, mask_row, mask_key;
    const float *key_bias;
    int64_t key_bias_head, key_bias_key;
    float *output, *lse, *entropy, *p_max, *max_score, *sum_squares; /* [B, H, Q] and [B, H, Q, V] */
    int64_t *argmax;
    float *received, *pooled, *moments; /* [B, H, K], [B, H, tiles, tiles], [B, H, Q, F] */
    const int32_t *place;               /* [Q], which of the rows R a query's row of the pattern is; -1 for none */
    int64_t rows_count;                 /* R */
    float *rows;                        /* [B, H, R, K] */
    float *scratch;
} Call;

static inline Floats all(float x) { return x - (Floats){0}; }

static inline Floats choose(Ints where, Floats a, Floats b) { return (Floats)((where & (Ints)a) | (~where & (Ints)b)); }

/* Where either is NaN: b. */
static inline Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }

/* The lanes in pairs, the pairs in pairs, and so on: short chains, in an order that is always the same. */
static inline float total(Floats x) {
    float lane[LANES];
    memcpy(lane, &x, BYTES);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

static inline float largest_lane(Floats x) {
    float lane[LANES];
    memcpy(lane, &x, BYTES);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
    return lane[0];
}

static inline int any(Ints x) {
    int64_t part[BYTES / 8], found = 0;
    memcpy(part, &x, BYTES);
    for (int i = 0; i < BYTES / 8; i++)
        found |= part[i];
    return found != 0;
}

/* exp(t) for t <= 88; 0 below -87.7. Cody and Waite's reduction, then a minimax polynomial (relative error 2e-9 before rounding). */
static inline Floats exponential(Floats t) {
    const Floats magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number, which then lies in the low bits */
    Floats z = t * all(1.44269504f) + magic;
    Floats n = z - magic;
    Floats r = t - n * all(0.693359375f);
    r = r + n * all(2.12194440e-4f);
    Floats p = all(1.381446689e-03f);
    p = p * r + all(8.368780415e-03f);
    p = p * r + all(4.166839421e-02f);
    p = p * r + all(1.666652011e-01f);
    p = p * r + all(4.999999341e-01f);
    p = p * (r * r) + r + all(1.0f);
    Ints power = ((Ints)z << 23) + (127 << 23); /* n = -127 makes it 0 */
    return p * (Floats)power;
}

/* Relative error below 4e-7: an odd polynomial near 0 (Cephes), 1 - 2 / (exp(2|x|) + 1) elsewhere. */
static inline Floats hyperbolic_tangent(Floats x) {
    Floats size = larger(x, -x), square = x * x;
    Floats p = all(-5.70498872745e-3f);
    p = p * square + all(2.06390887954e-2f);
    p = p * square + all(-5.37397155531e-2f);
    p = p * square + all(1.33314422036e-1f);
    p = p * square + all(-3.33332819422e-1f);
    p = p * square * x + x;
    Floats capped = choose(size > all(20.0f), all(20.0f), size);
    Floats far = all(1.0f) - all(2.0f) / (exponential(capped + capped) + all(1.0f));
    return choose(size < all(0.625f), p, choose(x < all(0.0f), -far, far)); /* NaN arrives through `far` */
}

static inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

static inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* The exponent is taken from a bias of 15 to one of 127 by a product; infinity and NaN keep the largest. */
static inline float from_half(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    const float factor = bits >= 0x7c00u << 13 ? 1 : 0x1p112f;
    bits |= bits >= 0x7c00u << 13 ? 0x7f800000u : 0;
    return from_bits(bits | (uint32_t)(half & 0x8000) << 16) * factor;
}

static inline __attribute__((always_inline)) float number(const void *base, int64_t dtype, int64_t at) {
    switch (dtype) {
    case FLOAT32: return ((const float *)base)[at];
    case FLOAT64: return (float)((const double *)base)[at];
    case FLOAT16: return from_half(((const uint16_t *)base)[at]);
    default: return from_bits((uint32_t)((const uint16_t *)base)[at] << 16);
    }
}

/* Inlined with a dtype and a step that the compiler knows, this is vector code. */
static inline __attribute__((always_inline)) void add(float *x, int64_t count, const void *base, int64_t dtype, int64_t start,
                                                      int64_t step) {
    if (step == 1)
        for (int64_t j = 0; j < count; j++)
            x[j] += number(base, dtype, start + j);
    else
        for (int64_t j = 0; j < count; j++)
            x[j] += number(base, dtype, start + j * step);
}

/* Softcap, bias, key bias and mask on the visible part [0, count) of one row, whose first key is `key`. */
static void finish_scores(const Call *c, float *x, int64_t count, int64_t head, int64_t query, int64_t key) {
    if (c->softcap > 0) {
        const Floats cap = all((float)c->softcap), inverse = all((float)(1 / c->softcap));
        for (int64_t j = 0; j < count; j += LANES) { /* may run past count: the row is padded */
            Floats scores;
            memcpy(&scores, x + j, BYTES);
            scores = cap * hyperbolic_tangent(scores * inverse);
            memcpy(x + j, &scores, BYTES);
        }
    }
    if (c->bias) {
        const int64_t start = head * c->bias_head + query * c->bias_row + key * c->bias_key;
        switch (c->bias_dtype) {
        case FLOAT32: add(x, count, c->bias, FLOAT32, start, c->bias_key); break;
        case FLOAT64: add(x, count, c->bias, FLOAT64, start, c->bias_key); break;
        case FLOAT16: add(x, count, c->bias, FLOAT16, start, c->bias_key); break;
        default: add(x, count, c->bias, BFLOAT16, start, c->bias_key);
        }
    }
    if (c->key_bias)
        add(x, count, c->key_bias, FLOAT32, head * c->key_bias_head + key * c->key_bias_key, c->key_bias_key);
    if (c->mask) {
        const uint8_t *mask = c->mask + head * c->mask_head + query * c->mask_row + key * c->mask_key;
        const int64_t step = c->mask_key;
        if (step == 1) {
            for (int64_t j = 0; j < count; j++)
                x[j] = mask[j] ? x[j] : -INFINITY;
        } else {
            for (int64_t j = 0; j < count; j++)
                x[j] = mask[j * step] ? x[j] : -INFINITY;
        }
    }
}

/* Largest of the padded row [0, n) and the lowest place that has it, -1 where all are -inf. NaN is passed over. */
static float largest(const float *x, int64_t n, int64_t *place) {
    float top = -INFINITY;
    int64_t where = -1;
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t stop = start + BLOCK < n ? start + BLOCK : n;
        Floats best = all(-INFINITY), other = all(-INFINITY);
        int64_t j = start;
        for (; j + 2 * LANES <= stop; j += 2 * LANES) {
            best = larger(*(const Floats *)(x + j), best);
            other = larger(*(const Floats *)(x + j + LANES), other);
        }
        if (j < stop)
            best = larger(*(const Floats *)(x + j), best);
        const float own = largest_lane(larger(other, best));
        if (own > top) {
            top = own;
            where = start;
        }
    }
    if (where >= 0) {
        const Floats wanted = all(top);
        while (!any(*(const Floats *)(x + where) == wanted))
            where += LANES;
        while (x[where] != top)
            where++;
    }
    *place = where;
    return top;
}

typedef struct {
    float sum, shifted, squares; /* of p, p t, p^2 */
} Sums;

/* Scores of the padded row [0, n) become p = exp(score - top). */
static inline __attribute__((always_inline)) Sums exponentials(float *x, int64_t n, float top, int all_sums) {
    const Floats shift = all(top), lowest = all(-88.0f);
    Floats sum = all(0), shifted = all(0), squares = all(0);
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t stop = start + BLOCK < n ? start + BLOCK : n;
        Floats own_sum = all(0), own_shifted = all(0), own_squares = all(0);
        for (int64_t j = start; j < stop; j += LANES) {
            Floats *at = (Floats *)(x + j);
            Floats t = larger(lowest, *at - shift);
            Floats p = exponential(t);
            *at = p;
            own_sum += p;
            if (all_sums) {
                own_shifted += p * t;
                own_squares += p * p;
            }
        }
        sum += own_sum;
        shifted += own_shifted;
        squares += own_squares;
    }
    return (Sums){total(sum), total(shifted), total(squares)};
}

static Sums exponentials_with_sums(float *x, int64_t n, float top) { return exponentials(x, n, top, 1); }
static Sums exponentials_alone(float *x, int64_t n, float top) { return exponentials(x, n, top, 0); }

/* One row of a panel: scores in, exponentials out, 0 where the query sees no key; its numbers are stored. `width` keys from `key`.
 * Returns the weight of the exponentials in the pattern: 0 for a dead row; NaN, beside exponentials of 0, where a score is NaN or
 * +inf. */
static float finish_row(const Call *c, float *x, int64_t width, int64_t head, int64_t query, int64_t key) {
    int64_t begin = c->first[query] - key, end = c->stop[query] - key, where = -1, argmax = -1;
    begin = begin < 0 ? 0 : begin;
    end = end > width ? width : end;
    const int64_t aligned = begin / LANES * LANES, n = up(end, LANES) - aligned;
    float top = -INFINITY, lse = -INFINITY, entropy = 0, squares = 0, weight = 0;
    Sums sums = {0, 0, 0};
    if (begin < end) {
        if (c->softcap > 0 || c->bias || c->key_bias || c->mask)
            finish_scores(c, x + begin, end - begin, head, query, key + begin);
        for (int64_t j = aligned; j < begin; j++)
            x[j] = -INFINITY;
        for (int64_t j = end; j < aligned + n; j++)
            x[j] = -INFINITY;
        top = largest(x + aligned, n, &where);
        if (where < 0) /* nothing but -inf and NaN */
            for (int64_t j = begin; j < end; j++)
                sums.sum += x[j] != x[j] ? NAN : 0;
        else if (top == INFINITY)
            sums.sum = NAN;
        else if (c->entropy || c->sum_squares)
            sums = exponentials_with_sums(x + aligned, n, top);
        else
            sums = exponentials_alone(x + aligned, n, top);
    }
    if (sums.sum != sums.sum) {
        top = lse = entropy = squares = weight = NAN;
    } else if (where >= 0) {
        const float log_sum = logf(sums.sum), sink = c->sink ? c->sink[head] : -INFINITY;
        lse = top + log_sum;
        entropy = log_sum - sums.shifted / sums.sum;
        squares = sums.squares / (sums.sum * sums.sum);
        argmax = key + aligned + where;
        weight = sink == INFINITY ? NAN : 1 / (sums.sum + (c->sink ? expf(sink - top) : 0));
    }
    if (where < 0 || weight != weight)
        begin = end = 0;
    memset(x, 0, (size_t)begin * sizeof(float));
    memset(x + end, 0, (size_t)(up(width, STRIPE) - end) * sizeof(float));
    const int64_t at = (c->batch * c->heads + head) * c->queries + query;
    if (c->lse)
        c->lse[at] = lse;
    if (c->entropy)
        c->entropy[at] = entropy;
    if (c->p_max)
        c->p_max[at] = weight;
    if (c->max_score)
        c->max_score[at] = top;
    if (c->sum_squares)
        c->sum_squares[at] = squares;
    if (c->argmax)
        c->argmax[at] = argmax;
    return weight;
}

/* columns[j] = sum over some rows of weight * p. */
static void sum_columns(const float *x, int64_t stride, int64_t rows, int64_t width, const float *weight, float *columns) {
    enum { PARTS = STRIPE / LANES };
    for (int64_t start = 0; start < width; start += STRIPE) {
        Floats sum[PARTS];
        for (int i = 0; i < PARTS; i++)
            sum[i] = all(0);
        for (int64_t row = 0; row < rows; row++) {
            const Floats *at = (const Floats *)(x + row * stride + start), own = all(weight[row]);
            for (int i = 0; i < PARTS; i++)
                sum[i] += own * at[i];
        }
        for (int i = 0; i < PARTS; i++)
            *(Floats *)(columns + start + i * LANES) = sum[i];
    }
}

/* What `rows` queries of one head, all in one row of tiles, add to received and pooled. NaN in a row is NaN for every key. */
static void add_columns(const Call *c, const float *x, int64_t stride, int64_t rows, int64_t width, const float *weight, int64_t head,
                        int64_t query, int64_t key, float *columns) {
    const int64_t at = c->batch * c->heads + head, tiles = (c->keys + c->tile - 1) / c->tile;
    const int64_t tile_rows = (c->queries + c->tile - 1) / c->tile;
    float *received = c->received ? c->received + at * c->keys : NULL;
    float *pooled = c->pooled ? c->pooled + (at * tile_rows + query / c->tile) * tiles : NULL;
    for (int64_t row = 0; row < rows; row++)
        if (weight[row] != weight[row]) {
            for (int64_t j = 0; received && j < c->keys; j++)
                received[j] = NAN;
            for (int64_t tile = 0; pooled && tile < tiles; tile++)
                pooled[tile] = NAN;
            return;
        }
    sum_columns(x, stride, rows, width, weight, columns);
    for (int64_t j = 0; received && j < width; j++)
        received[key + j] += columns[j];
    for (int64_t j = 0; pooled && j < width;) {
        const int64_t tile = (key + j) / c->tile, next = (tile + 1) * c->tile - key, stop = next < width ? next : width;
        float mass = 0;
        for (; j < stop; j++)
            mass += columns[j];
        pooled[tile] += mass;
    }
}

static void keep_row(const Call *c, const float *x, int64_t width, float weight, int64_t head, int64_t query, int64_t key) {
    float *to = c->rows + ((c->batch * c->heads + head) * c->rows_count + c->place[query]) * c->keys;
    for (int64_t j = 0; j < c->keys; j++)
        to[j] = weight == weight ? 0 : NAN;
    for (int64_t j = 0; j < width; j++)
        to[key + j] = x[j] * weight;
}

static void multiply(const Call *c, const float *p, int64_t stride, int64_t rows, int64_t width, const float *v, int64_t v_row,
                     int64_t v_width, float *out) {
    const float one = 1, nothing = 0;
    c->gemm("N", "N", &v_width, &rows, &width, &one, v, &v_row, p, &stride, &nothing, out, &v_width);
}

static int64_t row_stride(int64_t width) { return up(width, STRIPE) + 16; } /* rows a power of two apart would share cache sets */

static int64_t widest(const Call *c) {
    int64_t found = 0;
    for (int64_t query = 0; query < c->queries; query += c->panel) {
        const int64_t last = (query + c->panel < c->queries ? query + c->panel : c->queries) - 1;
        const int64_t width = c->stop[last] - c->first[query];
        found = width > found ? width : found;
    }
    return found;
}

static int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

/* How many floats of scratch a call needs, at an address that is a multiple of 64. */
int64_t headscope_scratch(const Call *c) {
    const int64_t rows = c->shared * c->panel, width = widest(c), results = at_least(c->value_width, c->features_width);
    return rows * row_stride(width) + up(rows * c->width, 16) + up(rows * results, 16) + up(width, STRIPE) + up(rows, 16);
}

/* Queries [query, query + count) of all heads that share the key head, scaled, one head below the other: [H / G * count, D]. */
static void gather_queries(const Call *c, int64_t query, int64_t count, float *to) {
    for (int64_t h = 0; h < c->shared; h++) {
        const float scale = c->head_scale[c->group * c->shared + h];
        for (int64_t i = 0; i < count; i++, to += c->width) {
            const float *from = c->q + h * c->q_head + (query + i) * c->q_row;
            for (int64_t d = 0; d < c->width; d++)
                to[d] = from[d * c->q_column] * scale;
        }
    }
}

/* Rows [count, size] of one head, weighted, into `to` [B, H, Q, size]. A dead row is 0 whatever the values are. */
static void store(const Call *c, const float *from, const float *weight, float factor, int64_t head, int64_t query, int64_t count,
                  int64_t size, float *to) {
    to += ((c->batch * c->heads + head) * c->queries + query) * size;
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < size; d++)
            to[i * size + d] = weight[i] == 0 ? 0 : from[i * size + d] * (weight[i] * factor);
}

/* Panels [begin, end) of one key/value head; `received` and `pooled` must hold 0 before the first. */
void headscope_attend(const Call *c, int64_t begin, int64_t end) {
    const int64_t most = c->shared * c->panel, capacity = widest(c), results = at_least(c->value_width, c->features_width);
    float *x = c->scratch, *q = x + most * row_stride(capacity), *out = q + up(most * c->width, 16);
    float *columns = out + up(most * results, 16), *weights = columns + up(capacity, STRIPE);
    const int64_t q_row = at_least(c->width, 1);
    const float one = 1, nothing = 0;
    for (int64_t query = begin * c->panel; query < end * c->panel && query < c->queries; query += c->panel) {
        const int64_t count = query + c->panel < c->queries ? c->panel : c->queries - query, rows = c->shared * count;
        const int64_t key = c->first[query], width = at_least(c->stop[query + count - 1] - key, 0), stride = row_stride(width);
        gather_queries(c, query, count, q);
        if (width)
            c->gemm("T", "N", &width, &rows, &c->width, &one, c->k + key * c->k_row, &c->k_row, q, &q_row, &nothing, x, &stride);
        for (int64_t h = 0; h < c->shared; h++) {
            const int64_t head = c->group * c->shared + h;
            float *own = x + h * count * stride, *weight = weights + h * count;
            for (int64_t i = 0; i < count; i++) {
                weight[i] = finish_row(c, own + i * stride, width, head, query + i, key);
                if (c->rows && c->place[query + i] >= 0)
                    keep_row(c, own + i * stride, width, weight[i], head, query + i, key);
            }
            for (int64_t i = 0, some; width && (c->received || c->pooled) && i < count; i += some) {
                const int64_t in_tile = c->pooled ? c->tile - (query + i) % c->tile : count;
                some = in_tile < count - i ? in_tile : count - i;
                add_columns(c, own + i * stride, stride, some, width, weight + i, head, query + i, key, columns);
            }
        }
        if (c->output && width)
            multiply(c, x, stride, rows, width, c->v + key * c->v_row, c->v_row, c->value_width, out);
        for (int64_t h = 0; c->output && h < c->shared; h++) {
            const int64_t head = c->group * c->shared + h, at = h * count;
            store(c, out + at * c->value_width, weights + at, c->gate ? c->gate[head] : 1, head, query, count, c->value_width, c->output);
        }
        for (int64_t h = 0; c->moments && h < c->shared; h++) {
            const int64_t size = c->features_width;
            if (width)
                multiply(c, x + h * count * stride, stride, count, width, c->features + h * c->features_head + key * size, size, size, out);
            store(c, out, weights + h * count, 1, c->group * c->shared + h, query, count, size, c->moments);
        }
    }
}

/* Whether a BLAS multiplies as it should, its integers being of whatever size: 1 or 0. */
int headscope_check(Gemm gemm) {
    const float a[6] = {1, 2, 3, 4, 5, 6}, b[6] = {1, 0, 2, 0, 1, 3}, one = 1, nothing = 0;
    float out[4] = {-1, -1, -1, -1};
    const int64_t two = 2, three = 3;
    gemm("T", "N", &two, &two, &three, &one, a, &three, b, &three, &nothing, out, &two); /* rows of a by rows of b */
    return out[0] == 7 && out[1] == 16 && out[2] == 11 && out[3] == 23;
}

const char *headscope_simd(void) { return SIMD; }
