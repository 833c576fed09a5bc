// What follows a convolution in inference: a BatchNorm by its running statistics, folded into the convolution's weights
// and bias.
#pragma once
#include <cmath>
#include <cstdint>

namespace overlock {

// A BatchNorm's values, each (C); all null: no norm.
struct Norm {
    const float *weight, *bias, *mean, *var;
    float eps;

    float scale(int c) const { return weight ? weight[c] / std::sqrt(var[c] + eps) : 1; }
    // Of a convolution's bias, null for none.
    float shift(int c, const float* conv_bias) const {
        return (weight ? bias[c] - mean[c] * scale(c) : 0) + (conv_bias ? conv_bias[c] * scale(c) : 0);
    }
};

// A depthwise convolution and the BatchNorm after it; weight (C, kernel, kernel), bias (C) or null.
struct Branch {
    const float *weight, *bias;
    int kernel, dilation;
    Norm norm;
};

}  // namespace overlock
