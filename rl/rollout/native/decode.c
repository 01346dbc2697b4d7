/* Decode attention and the elementwise parts of a decode step for small policies on a CPU, in fp32.

   At a width of 128 a step is made of hundreds of tiny tensor operations, each of which costs more to call than to
   compute, and attention by batched matmul reads the cache from memory several times. Here each is one pass. Every row is
   computed by itself and in an order that only its own lengths decide, so results do not depend on the batch.

   All pointers are to contiguous float32 unless a stride is given; strides count numbers. Called through ctypes by
   library.py, which documents the arguments; loops over rows are shared among `threads` OpenMP threads when built so. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>

typedef int64_t i64;
typedef float vec __attribute__((vector_size(64)));

/* exp(x) to 1.5 ulp for x in [-87, 88]; written so that loops over it become vector code. */
static inline float exp_clamped(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: rounds to the nearest integer */
    const float whole = shifted - 12582912.0f;
    float r = x - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const int32_t power = ((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    return y * scale;
}

static inline float dot(const float *a, const float *b, i64 n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (i64 i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void normalise(const float *x, const float *weight, float eps, i64 n, float *out) {
    const float inverse = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
#pragma omp simd
    for (i64 i = 0; i < n; i++) out[i] = x[i] * inverse * weight[i];
}

static void rotate(const float *x, const float *turn, i64 n, float *out) {
    for (i64 i = 0; i < n; i += 2) {
        const float a = x[i], b = x[i + 1];
        out[i] = a * turn[i] - b * turn[i + 1];
        out[i + 1] = b * turn[i] + a * turn[i + 1];
    }
}

void rms_norm(const float *x, const float *weight, float eps, float *out, i64 rows, i64 width, i64 threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (i64 r = 0; r < rows; r++) normalise(x + r * width, weight, eps, width, out + r * width);
}

void split_joined(const float *joined, i64 query_width, i64 rank, i64 rope, const float *query_weight, float query_eps,
                  float *query, const float *latent_weight, float latent_eps, const float *turns, float *own,
                  i64 slot_stride, const i64 *positions, i64 rows, i64 threads) {
    const i64 width = rank + rope;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (i64 r = 0; r < rows; r++) {
        const float *line = joined + r * (query_width + width);
        float *cached = own + r * slot_stride + positions[r] * width;
        if (query_weight)
            normalise(line, query_weight, query_eps, query_width, query + r * query_width);
        else
            memcpy(query + r * query_width, line, query_width * sizeof(float));
        normalise(line + query_width, latent_weight, latent_eps, rank, cached);
        rotate(line + query_width + rank, turns + r * rope, rope, cached + rank);
    }
}

/* Sums of 16 vectors, one lane each: pairs are folded in halves, quarters, ... until each has become one number. */
#define FOLD(x, y, ...) (__builtin_shufflevector(x, y, EVEN_##__VA_ARGS__) + __builtin_shufflevector(x, y, ODD_##__VA_ARGS__))
#define EVEN_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define ODD_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define EVEN_4 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define ODD_4 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#define EVEN_2 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29
#define ODD_2 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31
#define EVEN_1 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD_1 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31

static inline vec sums_of(const vec *a) {
    const vec b0 = FOLD(a[0], a[1], 8), b1 = FOLD(a[2], a[3], 8), b2 = FOLD(a[4], a[5], 8), b3 = FOLD(a[6], a[7], 8);
    const vec b4 = FOLD(a[8], a[9], 8), b5 = FOLD(a[10], a[11], 8), b6 = FOLD(a[12], a[13], 8),
              b7 = FOLD(a[14], a[15], 8);
    const vec c0 = FOLD(b0, b1, 4), c1 = FOLD(b2, b3, 4), c2 = FOLD(b4, b5, 4), c3 = FOLD(b6, b7, 4);
    const vec d0 = FOLD(c0, c1, 2), d1 = FOLD(c2, c3, 2);
    return FOLD(d0, d1, 1);
}

static inline vec load(const float *x) {
    vec v;
    memcpy(&v, x, sizeof v);
    return v;
}

/* 4 heads against 4 tokens: 16 dot products at once. */
static inline void score_4x4(const float *q, const float *keys, i64 width, float *scores, i64 stride) {
    vec sums[16];
    memset(sums, 0, sizeof sums);
    for (i64 i = 0; i < width; i += 16) {
        const vec q0 = load(q + i), q1 = load(q + width + i), q2 = load(q + 2 * width + i), q3 = load(q + 3 * width + i);
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) {
            const vec key = load(keys + t * width + i);
            sums[t] += q0 * key;
            sums[4 + t] += q1 * key;
            sums[8 + t] += q2 * key;
            sums[12 + t] += q3 * key;
        }
    }
    const vec result = sums_of(sums);
    for (int h = 0; h < 4; h++) memcpy(scores + h * stride, (const float *)&result + 4 * h, 4 * sizeof(float));
}

/* scores (heads, stride): q (heads, width) against keys (tokens, width). */
static void score(const float *q, const float *keys, i64 tokens, i64 heads, i64 width, float *scores, i64 stride) {
    const i64 whole_heads = width % 16 ? 0 : heads / 4 * 4, whole_tokens = tokens / 4 * 4;
    for (i64 h = 0; h < whole_heads; h += 4) {
        for (i64 t = 0; t < whole_tokens; t += 4)
            score_4x4(q + h * width, keys + t * width, width, scores + h * stride + t, stride);
        for (i64 t = whole_tokens; t < tokens; t++)
            for (i64 j = h; j < h + 4; j++) scores[j * stride + t] = dot(q + j * width, keys + t * width, width);
    }
    for (i64 t = 0; t < tokens; t++)
        for (i64 h = whole_heads; h < heads; h++) scores[h * stride + t] = dot(q + h * width, keys + t * width, width);
}

/* out (heads, rank) += p (heads, stride) times the first `rank` columns of keys (tokens, width). */
static void add_values(const float *p, i64 stride, const float *keys, i64 tokens, i64 heads, i64 rank, i64 width,
                       float *out) {
    const i64 whole_heads = rank % 16 ? 0 : heads / 4 * 4;
    for (i64 h = 0; h < whole_heads; h += 4)
        for (i64 c = 0; c < rank; c += 16) {
            const float *weights = p + h * stride;
            float *target = out + h * rank + c;
            vec a = load(target), b = load(target + rank), d = load(target + 2 * rank), e = load(target + 3 * rank);
            for (i64 t = 0; t < tokens; t++) {
                const vec value = load(keys + t * width + c);
                a += weights[t] * value;
                b += weights[stride + t] * value;
                d += weights[2 * stride + t] * value;
                e += weights[3 * stride + t] * value;
            }
            memcpy(target, &a, sizeof a);
            memcpy(target + rank, &b, sizeof b);
            memcpy(target + 2 * rank, &d, sizeof d);
            memcpy(target + 3 * rank, &e, sizeof e);
        }
    for (i64 t = 0; t < tokens; t++)
        for (i64 h = whole_heads; h < heads; h++) {
            const float weight = p[h * stride + t];
#pragma omp simd
            for (i64 c = 0; c < rank; c++) out[h * rank + c] += weight * keys[t * width + c];
        }
}

/* One row: softmax over [prompt | own], all heads. scratch holds heads * width + heads * (prompt + own) numbers. */
static void attend_row(const float *q, const float *turn, const float *prompt, i64 prompt_len, const float *own,
                       i64 own_len, i64 heads, i64 rank, i64 rope, float scale, float *scratch, float *out) {
    const i64 width = rank + rope, tokens = prompt_len + own_len;
    float *turned = scratch, *scores = scratch + heads * width;
    for (i64 h = 0; h < heads; h++) {
#pragma omp simd
        for (i64 c = 0; c < width; c++) turned[h * width + c] = q[h * width + c] * scale;
        if (turn) rotate(turned + h * width + rank, turn, rope, turned + h * width + rank);
    }
    score(turned, prompt, prompt_len, heads, width, scores, tokens);
    score(turned, own, own_len, heads, width, scores + prompt_len, tokens);
    for (i64 h = 0; h < heads; h++) {
        float *line = scores + h * tokens, top = line[0], total = 0.0f;
#pragma omp simd reduction(max : top)
        for (i64 t = 0; t < tokens; t++) top = line[t] > top ? line[t] : top;
#pragma omp simd reduction(+ : total)
        for (i64 t = 0; t < tokens; t++) {
            line[t] = exp_clamped(line[t] - top);
            total += line[t];
        }
        const float inverse = 1.0f / total;
#pragma omp simd
        for (i64 t = 0; t < tokens; t++) line[t] *= inverse;
    }
    memset(out, 0, heads * rank * sizeof(float));
    add_values(scores, tokens, prompt, prompt_len, heads, rank, width, out);
    add_values(scores + prompt_len, tokens, own, own_len, heads, rank, width, out);
}

void attend(const float *q, const float *turns, const float *own, i64 own_stride, const i64 *own_len,
            const float *prompt, i64 prompt_stride, const i64 *prompt_slot, const i64 *prompt_len, i64 most_tokens,
            float *out, i64 rows, i64 heads, i64 rank, i64 rope, float scale, i64 threads) {
    const i64 width = rank + rope;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *scratch = malloc(heads * (width + most_tokens) * sizeof(float));
#pragma omp for schedule(static)
        for (i64 r = 0; r < rows; r++)
            attend_row(q + r * heads * width, turns ? turns + r * rope : 0, prompt + prompt_slot[r] * prompt_stride,
                       prompt_len[r], own + r * own_stride, own_len[r], heads, rank, rope, scale, scratch,
                       out + r * heads * rank);
        free(scratch);
    }
}

/* Counting sort of rows * k choices by expert, stable. offsets (experts): where each expert's rows end; place (rows * k):
   the sorted row of each choice; gathered (rows * k, width): x of each sorted row. Returns the fewest rows of any
   expert that has some. */
i64 gather_by_expert(const i64 *experts, i64 rows, i64 k, i64 num_experts, const float *x, i64 width, int32_t *offsets,
                     int32_t *place, float *gathered) {
    memset(offsets, 0, num_experts * sizeof(int32_t));
    for (i64 i = 0; i < rows * k; i++) offsets[experts[i]]++;
    i64 fewest = rows * k;
    int32_t start = 0;
    for (i64 e = 0; e < num_experts; e++) {
        const int32_t count = offsets[e];
        if (count && count < fewest) fewest = count;
        offsets[e] = start;
        start += count;
    }
    for (i64 i = 0; i < rows * k; i++) {
        place[i] = offsets[experts[i]]++;
        memcpy(gathered + place[i] * width, x + i / k * width, width * sizeof(float));
    }
    return fewest;
}

void silu_mul(const float *gate_up, float *out, i64 rows, i64 inner, i64 threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (i64 r = 0; r < rows; r++) {
        const float *gate = gate_up + r * 2 * inner, *up = gate + inner;
#pragma omp simd
        for (i64 i = 0; i < inner; i++) out[r * inner + i] = gate[i] / (1.0f + exp_clamped(-gate[i])) * up[i];
    }
}

/* residual (rows, width) += sum over k of weights (rows, k) * parts (sorted rows, width) at place (rows, k). */
void add_experts(float *residual, const float *parts, const int32_t *place, const float *weights, i64 rows, i64 k,
                 i64 width, i64 threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (i64 r = 0; r < rows; r++)
        for (i64 j = 0; j < k; j++) {
            const float weight = weights[r * k + j];
            const float *part = parts + (i64)place[r * k + j] * width;
#pragma omp simd
            for (i64 i = 0; i < width; i++) residual[r * width + i] += weight * part[i];
        }
}
