/* A decode step of small policies on a CPU, in fp32: attention, MLPs, experts, router and the draw.

   At a width of 128 a step is made of hundreds of tiny tensor operations, each of which costs more to call than to
   compute, and attention by batched matmul reads the cache from memory several times. Here each is one pass, and a
   layer is a few calls. Every row is computed by itself and in an order that only its own lengths decide, so results do
   not depend on the batch.

   All pointers are to contiguous float32 unless a stride is given; strides count numbers. Called through ctypes by
   library.py, which documents the arguments; loops over rows are shared among `threads` OpenMP threads when built so. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>

typedef int64_t i64;
typedef float vec __attribute__((vector_size(64)));
#ifdef __AVX512F__
#define WIDE 1 /* a vec is one register, of which there are 32 */
#else
#define WIDE 0
#endif

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

/* ln(x) to 1 ulp for positive normal x (Cephes' polynomial). */
static inline float log_positive(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    int32_t power = (bits >> 23) - 126;
    bits = (bits & 0x007fffff) | 0x3f000000; /* the mantissa, in [0.5, 1) */
    float m;
    memcpy(&m, &bits, 4);
    const int32_t low = m < 0.707106781186547524f;
    power -= low;
    m = m + (float)low * m - 1.0f;
    const float square = m * m, e = (float)power;
    float y = 7.0376836292e-2f;
    y = y * m - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    return m + (y * m * square + e * -2.12194440e-4f - 0.5f * square) + e * 0.693359375f;
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

/* 4 heads at once, `vecs` vectors of columns: out (4, rank) += p (4, stride) times keys (tokens, width). */
static inline __attribute__((always_inline)) void add_4(const float *p, i64 stride, const float *keys, i64 tokens,
                                                        i64 rank, i64 width, float *out, const int vecs) {
    vec sums[4][2];
#pragma GCC unroll 4
    for (int h = 0; h < 4; h++)
#pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) sums[h][v] = load(out + h * rank + 16 * v);
    for (i64 t = 0; t < tokens; t++)
#pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) {
            const vec value = load(keys + t * width + 16 * v);
#pragma GCC unroll 4
            for (int h = 0; h < 4; h++) sums[h][v] += p[h * stride + t] * value;
        }
#pragma GCC unroll 4
    for (int h = 0; h < 4; h++)
#pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) memcpy(out + h * rank + 16 * v, &sums[h][v], sizeof(vec));
}

/* out (heads, rank) += p (heads, stride) times the first `rank` columns of keys (tokens, width). */
static void add_values(const float *p, i64 stride, const float *keys, i64 tokens, i64 heads, i64 rank, i64 width,
                       float *out) {
    const i64 whole_heads = rank % 16 ? 0 : heads / 4 * 4;
    for (i64 h = 0; h < whole_heads; h += 4) {
        const float *weights = p + h * stride;
        i64 c = 0;
        for (; WIDE && c + 32 <= rank; c += 32)
            add_4(weights, stride, keys + c, tokens, rank, width, out + h * rank + c, 2);
        for (; c < rank; c += 16) add_4(weights, stride, keys + c, tokens, rank, width, out + h * rank + c, 1);
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

static inline i64 largest(const float *x, i64 n) {
    i64 at = 0;
    for (i64 i = 1; i < n; i++)
        if (x[i] > x[at]) at = i;
    return at;
}

/* -inf for all scores (num_experts) but those of the best groups; best: scratch for one number a group. */
static void leave_best_groups(float *scores, i64 num_experts, i64 groups, i64 top_groups, i64 two_best, float *best) {
    const i64 size = num_experts / groups;
    for (i64 g = 0; g < groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (i64 e = g * size; e < (g + 1) * size; e++) {
            const float low = scores[e] > first ? first : scores[e];
            first = scores[e] > first ? scores[e] : first;
            second = low > second ? low : second;
        }
        best[g] = two_best ? first + second : first;
    }
    for (i64 j = 0; j < top_groups; j++) best[largest(best, groups)] = -INFINITY; /* those that stay */
    for (i64 g = 0; g < groups; g++)
        for (i64 e = g * size; best[g] > -INFINITY && e < (g + 1) * size; e++) scores[e] = -INFINITY;
}

/* The K experts of each row of x (rows, width), and what each counts: scores are sigmoids or a softmax of x times weight
   (num_experts, width); bias (num_experts or null) is added for the choice only. top_groups > 0: only experts of the
   best so many of `groups` groups, which count by their two best (two_best) or their best score. */
void route(const float *x, const float *weight, const float *bias, i64 rows, i64 width, i64 num_experts, i64 k,
           i64 groups, i64 top_groups, i64 two_best, i64 sigmoid, i64 normalised, float scaling, i64 *chosen,
           float *weights, i64 threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *scores = malloc((2 * num_experts + groups) * sizeof(float));
        float *biased = scores + num_experts, *best = biased + num_experts;
#pragma omp for schedule(static)
        for (i64 r = 0; r < rows; r++) {
            float top = -INFINITY, total = 0.0f;
            for (i64 e = 0; e < num_experts; e++) {
                scores[e] = dot(x + r * width, weight + e * width, width);
                top = scores[e] > top ? scores[e] : top;
            }
#pragma omp simd reduction(+ : total)
            for (i64 e = 0; e < num_experts; e++) {
                scores[e] = sigmoid ? 1.0f / (1.0f + exp_clamped(-scores[e])) : exp_clamped(scores[e] - top);
                total += scores[e];
            }
            for (i64 e = 0; e < num_experts; e++) {
                if (!sigmoid) scores[e] /= total;
                biased[e] = scores[e] + (bias ? bias[e] : 0.0f);
            }
            if (top_groups) leave_best_groups(biased, num_experts, groups, top_groups, two_best, best);
            float sum = 0.0f;
            for (i64 j = 0; j < k; j++) {
                const i64 e = largest(biased, num_experts);
                biased[e] = -INFINITY;
                chosen[r * k + j] = e;
                sum += weights[r * k + j] = scores[e];
            }
            const float factor = normalised ? scaling / (sum + 1e-20f) : scaling;
            for (i64 j = 0; j < k; j++) weights[r * k + j] *= factor;
        }
        free(scores);
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

/* out (inner) = silu(first half) * second half of line (2 * inner); out may be its first half. */
static void gated(const float *line, float *out, i64 inner) {
#pragma omp simd
    for (i64 i = 0; i < inner; i++) out[i] = line[i] / (1.0f + exp_clamped(-line[i])) * line[inner + i];
}

void silu_mul(const float *gate_up, float *out, i64 rows, i64 inner, i64 threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (i64 r = 0; r < rows; r++) gated(gate_up + r * 2 * inner, out + r * inner, inner);
}

/* Products with matrices packed in panels of PANEL outputs, (outputs / PANEL, inputs, PANEL): TILE rows by one panel are
   summed in registers, over the inputs in their order, so a row's bits do not depend on the rows beside it. */
#define TILE 6
#define BLOCK 48 /* rows that stay in the cache from one matrix to the next */
#define VECS 4
#define PANEL (16 * VECS)

/* 0 where a tile would not stay in registers: torch's products are faster there. */
i64 panel_width(void) { return WIDE ? PANEL : 0; }

static inline __attribute__((always_inline)) void tile(const float *const *x, const float *panel, i64 inputs,
                                                       float *const *out, i64 column, const int rows) {
    vec sums[TILE][VECS];
    memset(sums, 0, sizeof sums);
    for (i64 i = 0; i < inputs; i++) {
        vec line[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) line[v] = load(panel + i * PANEL + 16 * v);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const float value = x[r][i];
#pragma GCC unroll 4
            for (int v = 0; v < VECS; v++) sums[r][v] += value * line[v];
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) memcpy(out[r] + column + 16 * v, &sums[r][v], sizeof(vec));
}

/* out (rows, outputs) = x (rows, inputs) times the matrix, rows given by where they begin. */
static void product(const float *const *x, i64 rows, const float *panels, i64 inputs, i64 outputs, float *const *out) {
    for (i64 c = 0; c < outputs; c += PANEL, panels += inputs * PANEL)
        for (i64 r = 0; r < rows; r += TILE)
            switch (rows - r) {
            case 1: tile(x + r, panels, inputs, out + r, c, 1); break;
            case 2: tile(x + r, panels, inputs, out + r, c, 2); break;
            case 3: tile(x + r, panels, inputs, out + r, c, 3); break;
            case 4: tile(x + r, panels, inputs, out + r, c, 4); break;
            case 5: tile(x + r, panels, inputs, out + r, c, 5); break;
            default: tile(x + r, panels, inputs, out + r, c, TILE);
            }
}

/* residual (rows, width) += sum over k of weights (rows, k) * parts (sorted rows, width) at place (rows, k), or in the
   order of the choices. */
void add_experts(float *residual, const float *parts, const int32_t *place, const float *weights, i64 rows, i64 k,
                 i64 width, i64 threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (i64 r = 0; r < rows; r++)
        for (i64 j = 0; j < k; j++) {
            const i64 choice = r * k + j;
            const float weight = weights[choice];
            const float *part = parts + (place ? place[choice] : choice) * width;
#pragma omp simd
            for (i64 i = 0; i < width; i++) residual[r * width + i] += weight * part[i];
        }
}

/* residual (rows, width) += attention of its normalised rows, whose new cache rows are written first; the arguments of
   rms_norm, split_joined and attend, with the projections between them in panels. query_panels and query_weight are
   null where queries are not compressed. */
void attention(float *residual, const float *norm_weight, float norm_eps, const float *joined_panels, i64 joined_width,
               const float *query_weight, float query_eps, const float *query_panels, const float *latent_weight,
               float latent_eps, const float *turns, float *own, i64 own_stride, const i64 *own_len,
               const float *prompt, i64 prompt_stride, const i64 *prompt_slot, const i64 *prompt_len, i64 most_tokens,
               const float *output_panels, i64 rows, i64 width, i64 heads, i64 rank, i64 rope, float scale,
               i64 threads) {
    const i64 latent = rank + rope, first = joined_width - latent, queries = heads * latent, context = heads * rank;
    const i64 line = 2 * width + joined_width + queries + context; /* numbers of a row: normalised to output */
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *scratch = malloc((BLOCK * line + heads * (latent + most_tokens)) * sizeof(float));
        float *normed[BLOCK], *joined[BLOCK], *query[BLOCK], *mixed[BLOCK], *out[BLOCK];
        for (i64 i = 0; i < BLOCK; i++) {
            normed[i] = scratch + i * line;
            joined[i] = normed[i] + width;
            query[i] = joined[i] + joined_width;
            mixed[i] = query[i] + queries;
            out[i] = mixed[i] + context;
        }
#pragma omp for schedule(static)
        for (i64 start = 0; start < rows; start += BLOCK) {
            const i64 count = rows - start < BLOCK ? rows - start : BLOCK;
            for (i64 i = 0; i < count; i++)
                normalise(residual + (start + i) * width, norm_weight, norm_eps, width, normed[i]);
            product((const float *const *)normed, count, joined_panels, width, joined_width, joined);
            for (i64 i = 0; i < count; i++) {
                const i64 r = start + i;
                float *cached = own + r * own_stride + (own_len[r] - 1) * latent;
                normalise(joined[i] + first, latent_weight, latent_eps, rank, cached);
                rotate(joined[i] + first + rank, turns + r * rope, rope, cached + rank);
                if (query_weight) normalise(joined[i], query_weight, query_eps, first, joined[i]);
            }
            if (query_panels) product((const float *const *)joined, count, query_panels, first, queries, query);
            for (i64 i = 0; i < count; i++) {
                const i64 r = start + i;
                attend_row(query_panels ? query[i] : joined[i], turns + r * rope,
                           prompt + prompt_slot[r] * prompt_stride, prompt_len[r], own + r * own_stride, own_len[r],
                           heads, rank, rope, scale, scratch + BLOCK * line, mixed[i]);
            }
            product((const float *const *)mixed, count, output_panels, context, width, out);
            for (i64 i = 0; i < count; i++)
#pragma omp simd
                for (i64 c = 0; c < width; c++) residual[(start + i) * width + c] += out[i][c];
        }
        free(scratch);
    }
}

/* residual (rows, width) += a dense MLP of x (rows, width), its matrices in panels. */
void dense_mlp(const float *x, const float *gate_up, const float *down, i64 rows, i64 width, i64 inner, float *residual,
               i64 threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (i64 start = 0; start < rows; start += BLOCK) {
        const i64 count = rows - start < BLOCK ? rows - start : BLOCK;
        const float *source[BLOCK];
        float *hidden[BLOCK], *target[BLOCK], *scratch = malloc(count * (2 * inner + width) * sizeof(float));
        for (i64 i = 0; i < count; i++) {
            source[i] = x + (start + i) * width;
            hidden[i] = scratch + i * 2 * inner;
            target[i] = scratch + count * 2 * inner + i * width;
        }
        product(source, count, gate_up, width, 2 * inner, hidden);
        for (i64 i = 0; i < count; i++) gated(hidden[i], hidden[i], inner);
        product((const float *const *)hidden, count, down, inner, width, target);
        for (i64 i = 0; i < count; i++)
#pragma omp simd
            for (i64 c = 0; c < width; c++) residual[(start + i) * width + c] += target[i][c];
        free(scratch);
    }
}

/* residual (rows, width) += sum over k of weights (rows, k) * what the expert of each choice (rows, k) makes of its row
   of x (rows, width). gate_up, down: each expert's matrices in panels. */
void experts(const float *x, const i64 *chosen, const float *weights, i64 rows, i64 k, i64 num_experts,
             const float *gate_up, const float *down, i64 width, i64 inner, float *residual, i64 threads) {
    const i64 choices = rows * k;
    i64 *starts = calloc(num_experts + 2, sizeof(i64)), *order = malloc(choices * sizeof(i64));
    float *parts = malloc(choices * width * sizeof(float));
    for (i64 i = 0; i < choices; i++) starts[chosen[i] + 2]++;
    for (i64 e = 2; e <= num_experts; e++) starts[e] += starts[e - 1];
    for (i64 i = 0; i < choices; i++) order[starts[chosen[i] + 1]++] = i;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const float **source = malloc(choices * sizeof *source);
        float **hidden = malloc(choices * sizeof *hidden), **target = malloc(choices * sizeof *target);
        float *scratch = malloc(choices * 2 * inner * sizeof(float));
        for (i64 i = 0; i < choices; i++) hidden[i] = scratch + i * 2 * inner;
#pragma omp for schedule(dynamic)
        for (i64 e = 0; e < num_experts; e++) {
            const i64 *mine = order + starts[e], count = starts[e + 1] - starts[e];
            for (i64 i = 0; i < count; i++) {
                source[i] = x + mine[i] / k * width;
                target[i] = parts + mine[i] * width;
            }
            product(source, count, gate_up + e * 2 * inner * width, width, 2 * inner, hidden);
            for (i64 i = 0; i < count; i++) gated(hidden[i], hidden[i], inner);
            product((const float *const *)hidden, count, down + e * inner * width, inner, width, target);
        }
        free(source);
        free(hidden);
        free(target);
        free(scratch);
    }
    add_experts(residual, parts, 0, weights, rows, k, width, threads);
    free(starts);
    free(order);
    free(parts);
}

static inline uint64_t splitmix64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* An Exp(1) draw from 32 bits: -ln(1 - u), u = (bits + 1/2) / 2^32; by its series where u is small. */
static inline float exponential(uint32_t bits) {
    bits = bits > 0xFFFFFF00u ? 0xFFFFFF00u : bits; /* u stays below 1 */
    const float u = ((float)bits + 0.5f) * 2.3283064365386963e-10f;
    const float series = u * (1.0f + u * (0.5f + u * (0.33333333f + u * (0.25f + u * 0.2f))));
    const float large = (float)(u >= 0.02f); /* a choice between the two would keep the loop from becoming vector code */
    return series + large * (-log_positive(1.0f - u) - series);
}

/* Each row's token and its log-probability at logits (rows, vocab) * inverse: the largest, or the winner of the race
   p / noise (rl.rollout.sampling's, with its noise). */
void draw(const float *logits, const i64 *seeds, const i64 *steps, float inverse, i64 greedy, i64 rows, i64 vocab,
          i64 *tokens, float *logprobs, i64 threads) {
    const uint64_t golden = 0x9E3779B97F4A7C15u;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *share = malloc(vocab * sizeof(float));
#pragma omp for schedule(static)
        for (i64 r = 0; r < rows; r++) {
            const float *line = logits + r * vocab;
            float top = -INFINITY;
            double total = 0.0;
#pragma omp simd reduction(max : top)
            for (i64 i = 0; i < vocab; i++) top = line[i] * inverse > top ? line[i] * inverse : top;
            for (i64 start = 0; start < vocab; start += 256) {
                const i64 end = vocab - start < 256 ? vocab : start + 256;
                float part = 0.0f;
#pragma omp simd reduction(+ : part)
                for (i64 i = start; i < end; i++) {
                    const float below = line[i] * inverse - top;
                    share[i] = below < -87.0f ? 0.0f : exp_clamped(below);
                    part += share[i];
                }
                total += part;
            }
            if (!greedy) {
                const uint64_t key = splitmix64(splitmix64((uint64_t)seeds[r] + golden) + (uint64_t)steps[r] * golden);
#pragma omp simd
                for (i64 i = 0; i < vocab; i++)
                    share[i] /= exponential((uint32_t)(splitmix64(key + (uint64_t)(i + 1) * golden) >> 32));
            }
            tokens[r] = largest(greedy ? line : share, vocab);
            logprobs[r] = line[tokens[r]] * inverse - top - (float)log(total);
        }
        free(share);
    }
}
