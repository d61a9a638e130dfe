/* Norms of blocks of fp32 numbers in memory, and blocks brought to a norm while they are still in the cache.
 *
 * Each of k tensors of one shape is seen as (outer, units, inner); a block is all entries of one unit. The rows of a matrix are units with
 * outer = 1, its columns units with inner = 1, the output channels of a transposed convolution lie between. A few hundred squares are
 * summed in fp32, as fast as memory gives them, and these sums in double; where they leave the range that fp32 keeps, squares are summed in
 * double, which holds that of every fp32 number. A sum never depends on the number of threads.
 */
#ifdef __F16C__
#include <immintrin.h>
#endif
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define SHORT 512L         /* entries that are summed in fp32 before they go into a double: sixteen a lane */
#define DEEP 32L           /* of columns so many: they have one lane each */
#define LOW 1e-30          /* of a mean square: below, squares that fp32 lost to underflow would count */
#define HIGH 1e300         /* an fp32 sum that overflowed is infinite */
#define PIECE 65536L       /* entries of a large block that are summed on their own: 256 kB, which the cache holds */
#define RUN 2048L          /* entries that are clamped together: 8 kB, which the nearest cache holds */
#define STRIPE 4096L       /* columns that are summed side by side: their sums take 16 kB */
#define SOME 8192L         /* entries of rows that are measured before the first is changed: 32 kB */
#define AT_ONCE (1L << 19) /* entries from which a second thread is worth starting */
#define MOST 64

typedef float Eight __attribute__((vector_size(32))); /* four of them are summed side by side */
typedef float Four __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(32)));

/* What Python keeps for tensors that are looked at again and again (``native.Workspace``): an argument of its own for each of these would
 * take longer than the kernel does on small ones. */
typedef struct {
    float **x;
    const long *sizes;                  /* of each tensor */
    long k, outer, units, inner;
    double *norms, *factors, *each;     /* one a block, one a block, one a tensor */
    long *changed;                      /* k + 1: how many blocks, or pieces, of each tensor; at the end how many norms are not finite */
    const double *radii;                /* one a block; without it, radius */
    double radius;
    int sphere;                         /* whether blocks below the radius are brought to it, too */
    int acts;                           /* whether norms are all that is wanted */
} Job;

/* ------------------------------------------------------------------------------------------------------------------- threads */

typedef struct {
    void (*work)(const void *, long, long);
    const void *job;
    long first, last;
} Share;

static void *take(void *given) {
    const Share *s = given;
    s->work(s->job, s->first, s->last);
    return NULL;
}

/* work(job, first, last) over 0 .. items, shared out evenly. */
static void share(void (*work)(const void *, long, long), const void *job, long items, long entries, int threads) {
    pthread_t started[MOST];
    Share shares[MOST];
    int running[MOST] = {0};
    if (threads > MOST) threads = MOST;
    if (entries < AT_ONCE) threads = 1;
    if (threads > items) threads = (int)items;
    for (int t = 1; t < threads; t++) {
        shares[t] = (Share){work, job, items * t / threads, items * (t + 1) / threads};
        running[t] = pthread_create(&started[t], NULL, take, &shares[t]) == 0;
    }
    work(job, 0, threads > 1 ? items / threads : items);
    for (int t = 1; t < threads; t++) {
        if (running[t]) pthread_join(started[t], NULL);
        else take(&shares[t]);
    }
}

/* ------------------------------------------------------------------------------------------------------------------- one block */

/* At most SHORT numbers. */
static inline double sum_few(const float *x, long n) {
    Eight a = {0}, b = {0}, c = {0}, d = {0}, p, q, r, s;
    long i = 0;
    for (; i + 32 <= n; i += 32) {
        memcpy(&p, x + i, 32), memcpy(&q, x + i + 8, 32), memcpy(&r, x + i + 16, 32), memcpy(&s, x + i + 24, 32);
        a += p * p, b += q * q, c += r * r, d += s * s;
    }
    for (; i + 8 <= n; i += 8) {
        memcpy(&p, x + i, 32);
        a += p * p;
    }
    a = (a + b) + (c + d);
    float rest = 0;
    for (; i < n; i++) rest += x[i] * x[i];
    return (double)(((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))) + (double)rest;
}

/* As the numbers are, for a sphere, which is to be met to the last digit. */
static double sum_exactly(const float *x, long n) {
    Doubles sums[4] = {{0}};
    Four few;
    long i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 4; j++) {
            memcpy(&few, x + i + 4 * j, sizeof few);
            const Doubles p = __builtin_convertvector(few, Doubles);
            sums[j] += p * p;
        }
    sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double sum = (sums[0][0] + sums[0][2]) + (sums[0][1] + sums[0][3]);
    for (; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sum;
}

/* Whether fp32 kept such a sum of n squares: those that it lost to underflow count less than rounding does. */
static inline int kept(double sum, long n) {
    return sum >= LOW * (double)n && sum <= HIGH;
}

static double sum_squares(const float *x, long n) {
    double sum = 0;
    int beyond = 0; /* where a run left the range the next one will, too */
    for (long start = 0; start < n; start += SHORT) {
        const long count = start + SHORT < n ? SHORT : n - start;
        double few = beyond ? 0 : sum_few(x + start, count);
        if (!kept(few, count)) {
            few = sum_exactly(x + start, count);
            beyond = !(few >= LOW * (double)count && few < 1e37);
        }
        sum += few;
    }
    return sum;
}

static void sum_columns_exactly(const float *x, long r, long n, long stride, double *sums) {
    for (long u = 0; u < n; u++) sums[u] = 0;
    for (long a = 0; a < r; a++)
        for (long u = 0; u < n; u++) sums[u] += (double)x[a * stride + u] * (double)x[a * stride + u];
}

/* Of each of n columns of r rows of this stride. */
static void sum_columns(const float *x, long r, long n, long stride, double *sums) {
    float lanes[STRIPE];
    int doubtful = 0;
    for (long u = 0; u < n; u++) sums[u] = 0;
    for (long a = 0; a < r; a += DEEP) {
        const long stop = a + DEEP < r ? a + DEEP : r;
        long b = a;
        for (long u = 0; u < n; u++) lanes[u] = 0;
        for (; b + 4 <= stop; b += 4) {
            const float *p = x + b * stride, *q = p + stride, *s = q + stride, *t = s + stride;
            for (long u = 0; u < n; u++) lanes[u] += (p[u] * p[u] + q[u] * q[u]) + (s[u] * s[u] + t[u] * t[u]);
        }
        for (; b < stop; b++)
            for (long u = 0; u < n; u++) lanes[u] += x[b * stride + u] * x[b * stride + u];
        for (long u = 0; u < n; u++) sums[u] += (double)lanes[u];
    }
    for (long u = 0; u < n; u++) doubtful |= !kept(sums[u], r);
    if (doubtful) sum_columns_exactly(x, r, n, stride, sums);
}

/* As torch's product with a factor in fp32, which is too narrow for some. */
static void multiply(float *x, long n, double factor) {
    if (factor >= 2.4e-38 && factor <= 3.4e38) {
        const float f = (float)factor;
        for (long i = 0; i < n; i++) x[i] *= f;
    } else {
        for (long i = 0; i < n; i++) x[i] = (float)((double)x[i] * factor);
    }
}

/* What brings a block of this norm to its radius; 1 for a zero block, and for one that is not finite. */
static double wanted(const Job *j, long block) {
    const double value = j->norms[block], radius = j->radii ? j->radii[block] : j->radius;
    if (!isfinite(value)) __atomic_fetch_add(&j->changed[j->k], 1, __ATOMIC_RELAXED);
    return value > 0 && isfinite(value) && (j->sphere || value > radius) ? radius / value : 1;
}

/* Gives blocks their factors, and says whether all may stay as they are. */
static int inside(const Job *j, long from, long to) {
    long outside = 0;
    if (!j->sphere && !j->radii) /* in one go: a NaN counts as outside */
        for (long b = from; b < to; b++) {
            j->factors[b] = 1;
            outside += !(j->norms[b] <= j->radius);
        }
    else outside = 1;
    for (long b = from; outside && b < to; b++) j->factors[b] = wanted(j, b);
    return !outside;
}

/* ------------------------------------------------------------------------------------------------------------------- all blocks */

static void rows(const void *given, long first, long last) {
    const Job *j = given;
    const long together = 1 + SOME / (1 + j->inner);
    for (long from = first; from < last; from += together) {
        const long to = from + together < last ? from + together : last;
        for (long row = from, t = from / j->units, u = from % j->units; row < to; row++) {
            j->norms[row] = (j->sphere ? sum_exactly : sum_squares)(j->x[t] + u * j->inner, j->inner);
            if (++u == j->units) t++, u = 0;
        }
        for (long row = from; row < to; row++) j->norms[row] = sqrt(j->norms[row]);
        if (j->acts && !inside(j, from, to)) {
            for (long row = from; row < to; row++) {
                const double f = j->factors[row];
                if (f == 1) continue;
                multiply(j->x[row / j->units] + row % j->units * j->inner, j->inner, f);
                __atomic_fetch_add(&j->changed[row / j->units], 1, __ATOMIC_RELAXED);
            }
        }
    }
}

/* Item i: a stripe of the units of one tensor. */
static void stripes(const void *given, long first, long last) {
    const Job *j = given;
    const long per = (j->units + STRIPE - 1) / STRIPE;
    for (long item = first; item < last; item++) {
        const long t = item / per, from = item % per * STRIPE, to = from + STRIPE < j->units ? from + STRIPE : j->units;
        double *sums = j->norms + t * j->units + from;
        float factors[STRIPE];
        int narrow = 0, any = 0;
        if (j->inner == 1) (j->sphere ? sum_columns_exactly : sum_columns)(j->x[t] + from, j->outer, to - from, j->units, sums);
        else {
            for (long u = 0; u < to - from; u++) sums[u] = 0;
            for (long a = 0; a < j->outer; a++)
                for (long u = 0; u < to - from; u++)
                    sums[u] += (j->sphere ? sum_exactly : sum_squares)(j->x[t] + (a * j->units + from + u) * j->inner, j->inner);
        }
        for (long u = 0; u < to - from; u++) sums[u] = sqrt(sums[u]);
        if (!j->acts) continue;
        if (inside(j, t * j->units + from, t * j->units + to)) continue;
        for (long u = 0; u < to - from; u++) {
            const double f = j->factors[t * j->units + from + u];
            factors[u] = (float)f;
            narrow |= !(f >= 2.4e-38 && f <= 3.4e38);
            if (f != 1) {
                any = 1;
                __atomic_fetch_add(&j->changed[t], 1, __ATOMIC_RELAXED);
            }
        }
        for (long a = 0; any && a < j->outer; a++) {
            float *x = j->x[t] + (a * j->units + from) * j->inner;
            if (j->inner == 1 && !narrow)
                for (long u = 0; u < to - from; u++) x[u] *= factors[u];
            else
                for (long u = 0; u < to - from; u++)
                    if (j->factors[t * j->units + from + u] != 1) multiply(x + u * j->inner, j->inner, j->factors[t * j->units + from + u]);
        }
    }
}

/* The norms of all blocks, (k * units); where it acts, each block is also brought to its radius, or under it. Returns how many were. */
long normwise_blocks(const Job *j, int threads) {
    const long entries = j->k * j->outer * j->units * j->inner;
    long all = 0;
    for (long i = 0; i <= j->k; i++) j->changed[i] = 0;
    if (j->outer == 1) share(rows, j, j->k * j->units, entries, threads);
    else share(stripes, j, j->k * ((j->units + STRIPE - 1) / STRIPE), entries, threads);
    for (long i = 0; i < j->k; i++) all += j->changed[i];
    return all;
}

/* ------------------------------------------------------------------------------------------------------------------- all together */

typedef struct {
    float **x, **y;
    const long *tensor, *from, *to; /* of each piece */
    double *sums, *apart, factor;
    int follows;
    float low, high;
    long *changed;
} Pieces;

static void sums_of(const void *given, long first, long last) {
    const Pieces *p = given;
    for (long i = first; i < last; i++) p->sums[i] = sum_squares(p->x[p->tensor[i]] + p->from[i], p->to[i] - p->from[i]);
}

/* From the end, which was read last and may be in the cache. */
static void multiply_all(const void *given, long first, long last) {
    const Pieces *p = given;
    for (long i = last - 1; i >= first; i--) multiply(p->x[p->tensor[i]] + p->from[i], p->to[i] - p->from[i], p->factor);
}

/* NaN stays, as clamp leaves it. A run that is all inside is not written; where the last one was not, the next is not read first. */
static void clamp_all(const void *given, long first, long last) {
    const Pieces *p = given;
    const float low = p->low, high = p->high;
    int outside = 0;
    for (long i = first; i < last; i++) {
        float *x = p->x[p->tensor[i]];
        for (long a = p->from[i]; a < p->to[i]; a += RUN) {
            const long b = a + RUN < p->to[i] ? a + RUN : p->to[i];
            if (!outside) {
                for (long e = a; e < b; e++) outside |= (x[e] < low) | (x[e] > high);
                if (!outside) continue;
            }
            outside = 0;
            for (long e = a; e < b; e++) {
                const float was = x[e], now = was < low ? low : was > high ? high : was;
                outside |= (was < low) | (was > high);
                x[e] = now;
            }
            if (outside) __atomic_fetch_add(&p->changed[p->tensor[i]], 1, __ATOMIC_RELAXED);
        }
    }
}

/* Of one stretch: how long it is, and how far from what it was, which may become what it is. */
static void moved(const float *x, float *y, long n, int follows, double *length, double *distance) {
    Eight a = {0}, b = {0}, c = {0}, d = {0}, p, q, r, s;
    float rest = 0, apart = 0;
    long i = 0;
    for (; i + 16 <= n; i += 16) {
        memcpy(&p, x + i, 32), memcpy(&q, y + i, 32), memcpy(&r, x + i + 8, 32), memcpy(&s, y + i + 8, 32);
        q = p - q, s = r - s, a += p * p, c += r * r, b += q * q, d += s * s;
    }
    for (; i + 8 <= n; i += 8) {
        memcpy(&p, x + i, 32), memcpy(&q, y + i, 32);
        q = p - q, a += p * p, b += q * q;
    }
    a += c, b += d;
    for (; i < n; i++) rest += x[i] * x[i], apart += (x[i] - y[i]) * (x[i] - y[i]);
    double one = rest, other = apart;
    for (int j = 0; j < 8; j++) one += (double)a[j], other += (double)b[j];
    if (!kept(one, n)) one = sum_exactly(x, n);
    if (!kept(other, n)) {
        other = 0;
        for (long e = 0; e < n; e++) other += ((double)x[e] - (double)y[e]) * ((double)x[e] - (double)y[e]);
    }
    if (follows) memcpy(y, x, (size_t)n * sizeof(float));
    *length += one, *distance += other;
}

static void moved_all(const void *given, long first, long last) {
    const Pieces *p = given;
    for (long i = first; i < last; i++) {
        const float *x = p->x[p->tensor[i]];
        float *y = p->y[p->tensor[i]];
        p->sums[i] = p->apart[i] = 0;
        for (long a = p->from[i]; a < p->to[i]; a += SHORT) {
            const long n = a + SHORT < p->to[i] ? SHORT : p->to[i] - a;
            moved(x + a, y + a, n, p->follows, &p->sums[i], &p->apart[i]);
        }
    }
}

static Pieces cut(float **x, const long *sizes, long k, long *pieces, long *entries) {
    long count = 0;
    *entries = 0;
    for (long i = 0; i < k; i++) count += (sizes[i] + PIECE - 1) / PIECE, *entries += sizes[i];
    *pieces = count;
    long *table = malloc((size_t)(3 * count + 1) * sizeof(long));
    if (!table) return (Pieces){0};
    long *tensor = table, *from = table + count, *to = table + 2 * count;
    for (long i = 0, n = 0; i < k; i++)
        for (long a = 0; a < sizes[i]; a += PIECE, n++) tensor[n] = i, from[n] = a, to[n] = a + PIECE < sizes[i] ? a + PIECE : sizes[i];
    return (Pieces){.x = x, .tensor = tensor, .from = from, .to = to};
}

/* Σ x² of each of k tensors, and of all together as what it returns; -1 where memory is out. */
double normwise_squares(const Job *j, int threads) {
    long count, entries;
    Pieces p = cut(j->x, j->sizes, j->k, &count, &entries);
    double total = 0;
    p.sums = p.tensor ? malloc((size_t)(count + 1) * sizeof(double)) : NULL;
    if (!p.sums) {
        free((void *)p.tensor);
        return -1;
    }
    share(sums_of, &p, count, entries, threads);
    for (long i = 0; i < j->k; i++) j->each[i] = 0;
    for (long i = 0; i < count; i++) j->each[p.tensor[i]] += p.sums[i];
    for (long i = 0; i < j->k; i++) total += j->each[i];
    free(p.sums);
    free((void *)p.tensor);
    return total;
}

/* Of each tensor now and as it was: now->each is the sum of its squares, was->each that of its changes. follows: what was becomes what is.
 * Returns -1 where memory is out, and nothing has changed. */
long normwise_moved(const Job *now, const Job *was, int follows, int threads) {
    long count, entries;
    Pieces p = cut(now->x, now->sizes, now->k, &count, &entries);
    p.y = was->x, p.follows = follows;
    p.sums = p.tensor ? malloc((size_t)(2 * count + 1) * sizeof(double)) : NULL;
    if (!p.sums) {
        free((void *)p.tensor);
        return -1;
    }
    p.apart = p.sums + count;
    share(moved_all, &p, count, entries, threads);
    for (long i = 0; i < now->k; i++) now->each[i] = was->each[i] = 0;
    for (long i = 0; i < count; i++) now->each[p.tensor[i]] += p.sums[i], was->each[p.tensor[i]] += p.apart[i];
    free(p.sums);
    free((void *)p.tensor);
    return 0;
}

/* Every tensor times one factor. Returns -1 where memory is out, and nothing has changed. */
long normwise_multiply(const Job *j, double factor, int threads) {
    long count, entries;
    Pieces p = cut(j->x, j->sizes, j->k, &count, &entries);
    if (!p.tensor) return -1;
    p.factor = factor;
    share(multiply_all, &p, count, entries, threads);
    free((void *)p.tensor);
    return 0;
}

/* Every entry into [low, high]. changed[i] is 0, and factors[i] 1, where tensor i was inside. Returns how many tensors were not; -1 where
 * memory is out. */
long normwise_clamp(const Job *j, float low, float high, int threads) {
    long count, entries, tensors = 0;
    Pieces p = cut(j->x, j->sizes, j->k, &count, &entries);
    if (!p.tensor) return -1;
    for (long i = 0; i < j->k; i++) j->changed[i] = 0;
    p.low = low, p.high = high, p.changed = j->changed;
    share(clamp_all, &p, count, entries, threads);
    for (long i = 0; i < j->k; i++) tensors += j->changed[i] != 0, j->factors[i] = j->changed[i] == 0;
    free((void *)p.tensor);
    return tensors;
}

/* ------------------------------------------------------------------------------------------------------------------- a step of AdamW */

/* k tensors with their gradients and moments, entry by entry alike in memory. Rates and decay are in what follows from them. */
typedef struct {
    float **x, **gradient, **first, **second, **count;
    const long *sizes;
    long k;
    const Job **bounds;        /* of each tensor: what brings its rows under a radius, or NULL */
    const long *place;         /* which of the tensors of its bounds it is */
    double *each, *apart;      /* of each tensor afterwards, as of ``normwise_moved``; NULL where they are not wanted */
    double rate, beta1, beta2, shrink, eps;
    float sign;                /* -1 to maximise */
    const long *tensor, *from, *to;
    double *sums;
    float *was; /* of each thread the entries that it steps, as they were: a stack may be too small for them */
    long longest;
    int workers;
} Step;

#ifdef __FMA__ /* without it fmaf is a call, and torch's kernel rounds twice, too */
#define ADDED(a, b, c) __builtin_fmaf(a, b, c)
#else
#define ADDED(a, b, c) ((a) * (b) + (c))
#endif
#ifdef __clang__
#define AS_WRITTEN
#else
#define AS_WRITTEN __attribute__((optimize("fp-contract=off")))
#endif

/* As torch's fused kernel: in its order, rounded where that rounds. */
AS_WRITTEN static void step_entries(const Step *s, float *restrict x, const float *restrict g, float *restrict m, float *restrict v, long n, double count) {
#ifdef __clang__
#pragma clang fp contract(off)
#endif
    const float shrink = (float)s->shrink, beta1 = (float)s->beta1, beta2 = (float)s->beta2, eps = (float)s->eps, sign = s->sign;
    const float left1 = (float)(1 - s->beta1), left2 = (float)(1 - s->beta2);
    const float rate = (float)(-s->rate / (1 - pow(s->beta1, count))), root = (float)sqrt(1 - pow(s->beta2, count));
    for (long i = 0; i < n; i++) {
        const float d = sign * g[i], was = m[i];
        const float a = left1 < 0.5f ? ADDED(left1, d - was, was) : d - (d - was) * beta1;
        const float b = ADDED(left2 * d, d, v[i] * beta2);
        m[i] = a, v[i] = b;
        x[i] = x[i] * shrink + rate * a / (sqrtf(b) / root + eps);
    }
}

static void step_all(const void *given, long first, long last) {
    Step *s = (Step *)given;
    float *was = s->each ? s->was + s->longest * __atomic_fetch_add(&s->workers, 1, __ATOMIC_RELAXED) : NULL;
    for (long i = first; i < last; i++) {
        const long t = s->tensor[i], from = s->from[i], n = s->to[i] - from;
        const Job *bounds = s->bounds[t];
        float *x = s->x[t] + from;
        if (s->each) memcpy(was, x, (size_t)n * sizeof(float));
        step_entries(s, x, s->gradient[t] + from, s->first[t] + from, s->second[t] + from, n, (double)*s->count[t]);
        if (bounds) {
            const long row = s->place[t] * bounds->units + from / bounds->inner;
            rows(bounds, row, row + n / bounds->inner);
        }
        if (!s->each) continue;
        s->sums[2 * i] = s->sums[2 * i + 1] = 0;
        for (long a = 0; a < n; a += SHORT)
            moved(x + a, was + a, a + SHORT < n ? SHORT : n - a, 0, &s->sums[2 * i], &s->sums[2 * i + 1]);
    }
}

/* Entries that are stepped together: 32 kB of each of four arrays stay in the cache, and whole rows where these have bounds. */
static long together(const Step *s, long t) {
    const long row = s->bounds[t] ? s->bounds[t]->inner : 1;
    return row < SOME ? SOME / row * row : row;
}

/* One step of all. Returns -1 where memory is out, and nothing has changed. */
long normwise_step(Step *s, int threads) {
    long pieces = 0, entries = 0;
    s->longest = s->workers = 0;
    for (long t = 0; t < s->k; t++) {
        pieces += (s->sizes[t] + together(s, t) - 1) / together(s, t), entries += s->sizes[t];
        if (s->longest < together(s, t)) s->longest = together(s, t);
    }
    long *table = malloc((size_t)(3 * pieces + 1) * sizeof(long)), *from = table + pieces, *to = from + pieces;
    s->sums = malloc((size_t)(2 * pieces + 1) * sizeof(double));
    s->was = malloc((size_t)(s->each ? s->longest * (threads < MOST ? threads : MOST) : 1) * sizeof(float));
    if (!table || !s->sums || !s->was) {
        free(table), free(s->sums), free(s->was);
        return -1;
    }
    for (long t = 0, i = 0; t < s->k; t++) {
        *s->count[t] += 1;
        for (long a = 0, n = together(s, t); a < s->sizes[t]; a += n, i++)
            table[i] = t, from[i] = a, to[i] = a + n < s->sizes[t] ? a + n : s->sizes[t];
    }
    s->tensor = table, s->from = from, s->to = to;
    share(step_all, s, pieces, entries, threads);
    for (long t = 0; s->each && t < s->k; t++) s->each[t] = s->apart[t] = 0;
    for (long i = 0; s->each && i < pieces; i++) s->each[table[i]] += s->sums[2 * i], s->apart[table[i]] += s->sums[2 * i + 1];
    free(table), free(s->sums), free(s->was);
    return 0;
}

/* ------------------------------------------------------------------------------------------------------------------- singular values */

/* Whether r*r*I - G has a Cholesky decomposition, where G is the Gram matrix of the shorter side: then no singular value is above r. */
static int below(const float *x, long m, long n, double r, double *room) {
    const long a = m < n ? m : n, b = m < n ? n : m, whole = b / 4 * 4;
    double *w = room, *g = room + a * b, *l = g + a * a;
    for (long i = 0; i < m; i++)
        for (long j = 0; j < n; j++) w[m <= n ? j * m + i : i * n + j] = (double)x[i * n + j];
    for (long i = 0; i < a * a; i++) g[i] = i % (a + 1) ? 0 : r * r;
    for (long t = 0; t < whole; t += 4) { /* four at a time, since each reads and writes all of G */
        const double *p = w + t * a, *q = p + a, *s = q + a, *u = s + a;
        for (long i = 0; i < a; i++)
            for (long j = 0; j <= i; j++) g[i * a + j] -= (p[i] * p[j] + q[i] * q[j]) + (s[i] * s[j] + u[i] * u[j]);
    }
    for (long t = whole; t < b; t++)
        for (long i = 0; i < a; i++)
            for (long j = 0; j <= i; j++) g[i * a + j] -= w[t * a + i] * w[t * a + j];
    for (long k = 0; k < a; k++) {
        if (!(g[k * a + k] > 0)) return 0; /* a NaN is not */
        const double pivot = sqrt(g[k * a + k]);
        for (long i = k + 1; i < a; i++) l[i] = g[i * a + k] / pivot;
        for (long i = k + 1; i < a; i++)
            for (long j = k + 1; j <= i; j++) g[i * a + j] -= l[i] * l[j];
    }
    return 1;
}

/* Of each tensor as an m x n matrix: factors[i] is 1 where no singular value is above r, by proof. Returns how many are not proven; -1
 * where memory is out. */
long normwise_spectra(const Job *j, long m, long n, double r) {
    const long a = m < n ? m : n;
    long beyond = 0;
    double *room = malloc((size_t)(m * n + a * a + a) * sizeof(double));
    if (!room) return -1;
    for (long i = 0; i < j->k; i++) {
        j->factors[i] = below(j->x[i], m, n, r, room);
        beyond += j->factors[i] == 0;
    }
    free(room);
    return beyond;
}

/* --------------------------------------------------------------------------------------------------------- what a file's numbers are */

#define STRETCH 4096L /* entries of which the largest is kept, so that outliers can be found again: 16 kB as fp32 */

/* Some entries of a tensor, one after the other as they lie in a file: which they are, and what is found. */
typedef struct {
    const void *x;
    long kind;                        /* 0: fp32, 1: bf16, 2: fp16 */
    long first, count, n;             /* the first one's place in the tensor, and how long the rows are that squares are summed over */
    double *rows;                     /* one for each row that they are in: Σ x² of the finite ones is added */
    float *tops;                      /* one for each STRETCH of them: the largest |x| that is finite */
    long zeros, nonfinite;            /* added to */
} Tally;

static void widen_bf16(const unsigned short *x, long n, unsigned *to) {
    for (long i = 0; i < n; i++) to[i] = (unsigned)x[i] << 16;
}

/* Without the instruction a power of two brings the exponent to fp32's bias; what lies below fp16's normal numbers comes out right, too. */
static void widen_fp16(const unsigned short *x, long n, float *to) {
    long i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
#endif
    for (; i < n; i++) {
        const unsigned up = (x[i] & 0x7fffu) << 13;
        float value;
        memcpy(&value, &up, 4);
        to[i] = value < 0x1p-96f ? value * 0x1p112f : INFINITY;
    }
}

static double sum_finite(const float *x, long n) {
    double sum = 0;
    for (long i = 0; i < n; i++) sum += isfinite(x[i]) ? (double)x[i] * (double)x[i] : 0;
    return sum;
}

/* Counts and the largest by the bits: of numbers without a sign these are in the same order. Returns how many are not finite. */
static int look_at(const float *x, long n, Tally *t, float *top) {
    int zeros = 0, bad = 0, largest = 0;
    for (long i = 0; i < n; i++) {
        int bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        const int finite = bits < 0x7f800000;
        zeros += bits == 0, bad += !finite;
        bits = finite ? bits : 0;
        largest = bits > largest ? bits : largest;
    }
    memcpy(top, &largest, 4);
    t->zeros += zeros, t->nonfinite += bad;
    return bad;
}

void normwise_tally(Tally *t) {
    float wide[STRETCH];
    const long begin = t->first / t->n;
    for (long from = 0, k = 0; from < t->count; from += STRETCH, k++) {
        const long n = t->count - from < STRETCH ? t->count - from : STRETCH;
        const float *x = (const float *)t->x + from;
        if (t->kind) x = wide;
        if (t->kind == 1) widen_bf16((const unsigned short *)t->x + from, n, (unsigned *)wide);
        if (t->kind == 2) widen_fp16((const unsigned short *)t->x + from, n, wide);
        const int bad = look_at(x, n, t, t->tops + k);
        for (long a = 0; a < n;) {
            const long place = t->first + from + a, left = t->n - place % t->n, count = left < n - a ? left : n - a;
            t->rows[place / t->n - begin] += bad ? sum_finite(x + a, count) : sum_squares(x + a, count);
            a += count;
        }
    }
}
