// BigVGAN's anti-aliased activation in one pass over each row: twice as many samples, x + sin^2(a x) / b, half of them
// again. Forward and backward, float32, one thread, a plain C interface.
//
// Both resamplings are FIRs of 12 taps, which act as two of six taps on the even and the odd samples:
//     even[t] = 2 sum_i A[i] x[t - 3 + i]      odd[t] = 2 sum_i B[i] x[t - 2 + i]
//     y[t]    =   sum_i A[i] odd[t - 3 + i]  +   sum_i B[i] even[t - 2 + i]
// where A are the taps 0, 2, ... and B the taps 1, 3, ...; the filter is symmetric, so B is A reversed, and the
// adjoint of a FIR with A is a FIR with B. Beyond their ends all signals go on with their last value.
#include <cmath>
#include <vector>

namespace {
constexpr long EDGE = 3, TAPS = 6;

struct Row {  // scratch of one row of n samples, with EDGE (gradients: two times EDGE) more at each side
    std::vector<float> x, even, odd, grad, grad_even, grad_odd;
    explicit Row(long n) {
        for (auto* v : {&x, &even, &odd, &grad, &grad_even, &grad_odd}) v->assign(n + 4 * EDGE, 0.0f);
    }
};

// out[t] = scale * sum of taps[i] in[t + i] (+ out[t])
template <bool ADD>
void fir(const float* __restrict__ in, const float* taps, float scale, float* __restrict__ out, long n) {
    const float a = scale * taps[0], b = scale * taps[1], c = scale * taps[2], d = scale * taps[3], e = scale * taps[4],
                f = scale * taps[5];
    for (long t = 0; t < n; t++) {
        float sum = a * in[t] + b * in[t + 1] + c * in[t + 2] + d * in[t + 3] + e * in[t + 4] + f * in[t + 5];
        out[t] = ADD ? out[t] + sum : sum;
    }
}

void upsample(const float* x, long n, const float* A, const float* B, Row& row) {
    float* padded = row.x.data();
    for (long t = 0; t < n; t++) padded[EDGE + t] = x[t];
    for (long i = 0; i < EDGE; i++) padded[i] = x[0], padded[EDGE + n + i] = x[n - 1];
    fir<false>(padded, A, 2.0f, row.even.data() + EDGE, n);
    fir<false>(padded + 1, B, 2.0f, row.odd.data() + EDGE, n);
}
}  // namespace

// x, y [rows, n]: row r is of channel r % channels. a, b [channels]: frequency, and one over the magnitude.
extern "C" void snake_forward(const float* x, float* y, long rows, long channels, long n, const float* A, const float* B,
                              const float* a, const float* b) {
    Row row(n);
    for (long r = 0; r < rows; r++) {
        const float frequency = 2.0f * a[r % channels], half = 0.5f * b[r % channels];
        upsample(x + r * n, n, A, B, row);
        float *__restrict__ even = row.even.data() + EDGE, *__restrict__ odd = row.odd.data() + EDGE;
        for (long t = 0; t < n; t++) even[t] += half * (1.0f - cosf(frequency * even[t]));
        for (long t = 0; t < n; t++) odd[t] += half * (1.0f - cosf(frequency * odd[t]));
        for (long i = 1; i <= EDGE; i++) {
            even[-i] = odd[-i] = even[0];
            even[n - 1 + i] = odd[n - 1 + i] = odd[n - 1];
        }
        fir<false>(odd - EDGE, A, 1.0f, y + r * n, n);
        fir<true>(even - EDGE + 1, B, 1.0f, y + r * n, n);
    }
}

// gy, gx [rows, n]: gradients of y and x. ga, gb [channels]: gradients of a and b, added to what is there.
extern "C" void snake_backward(const float* x, const float* gy, float* gx, float* ga, float* gb, long rows,
                               long channels, long n, const float* A, const float* B, const float* a, const float* b) {
    Row row(n);
    for (long r = 0; r < rows; r++) {
        const float frequency = 2.0f * a[r % channels], half = 0.5f * b[r % channels];
        upsample(x + r * n, n, A, B, row);
        const float *__restrict__ even = row.even.data() + EDGE, *__restrict__ odd = row.odd.data() + EDGE;

        // y to the two phases: index EDGE is sample 0. A FIR that reads from in[t - 3] gives back from gy[t - 2].
        float *grad = row.grad.data(), *grad_even = row.grad_even.data(), *grad_odd = row.grad_odd.data();
        for (long i = 0; i < 2 * EDGE; i++) grad[i] = grad[2 * EDGE + n + i] = 0.0f;
        for (long t = 0; t < n; t++) grad[2 * EDGE + t] = gy[r * n + t];
        const long padded = n + 2 * EDGE;
        fir<false>(grad + 1, B, 1.0f, grad_odd, padded - 1), grad_odd[padded - 1] = 0.0f;
        fir<false>(grad, A, 1.0f, grad_even, padded);
        for (long i = 0; i < EDGE; i++) {
            grad_even[EDGE] += grad_even[i] + grad_odd[i];
            grad_odd[EDGE + n - 1] += grad_even[EDGE + n + i] + grad_odd[EDGE + n + i];
        }

        // the phases to what went into the snake; sin is a shifted cos, since the compiler makes no vectors of sincos
        float of_a = 0.0f, of_b = 0.0f;
        for (int phase = 0; phase < 2; phase++) {
            const float* __restrict__ z = phase ? odd : even;
            float* __restrict__ g = (phase ? grad_odd : grad_even) + EDGE;
            for (long t = 0; t < n; t++) {
                const float angle = frequency * z[t], sine = cosf(angle - 1.57079632679f);
                of_b += g[t] * 0.5f * (1.0f - cosf(angle));
                of_a += g[t] * 2.0f * half * z[t] * sine;
                g[t] *= 1.0f + half * frequency * sine;
            }
        }
        ga[r % channels] += of_a;
        gb[r % channels] += of_b;

        // and to x: again with zeros beyond the ends, then what belongs to the repeated ends is added to them
        float* into = row.x.data();
        for (float* g : {grad_even, grad_odd})
            for (long t = n + 4 * EDGE - 1; t >= 0; t--) {
                const long from = t - EDGE;  // moved to index 2 EDGE
                g[t] = from >= EDGE && from < EDGE + n ? g[from] : 0.0f;
            }
        fir<false>(grad_even + 1, B, 2.0f, into, padded - 1), into[padded - 1] = 0.0f;
        fir<true>(grad_odd, A, 2.0f, into, padded);
        for (long i = 0; i < EDGE; i++) into[EDGE] += into[i], into[EDGE + n - 1] += into[EDGE + n + i];
        for (long t = 0; t < n; t++) gx[r * n + t] = into[EDGE + t];
    }
}
