module github.com/weirmesh/weir/test/bench/nftables

go 1.26.9

require github.com/hashicorp/consul/sdk v0.19.0
